"""The imports of the process that trainers are forked from: all installed packages that make and train models."""

import os
from contextlib import suppress

# torch's profiler warns of each tensor that was allocated before a profile and freed within it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch._dynamo  # noqa: F401, which fusing needs

import benchmarks.training  # noqa: F401
from benchmarks.models import import_torchvision

with suppress(Exception):
    import_torchvision()
    import timm  # noqa: F401
