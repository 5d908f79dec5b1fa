"""What the process imports that trainers are forked from: all that makes and trains models, as far as it is there."""

import os
from contextlib import suppress

# torch's profiler warns of each tensor that is older than a profile and freed within it.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch._dynamo  # noqa: F401, which fusing needs

import benchmarks.training  # noqa: F401
from benchmarks.models import import_torchvision

with suppress(Exception):
    import_torchvision()
    import timm  # noqa: F401
