"""Whether there is a GPU to measure on, and which one it is."""

import os
import subprocess
import warnings
from dataclasses import replace

import torch

from benchmarks.provenance import provenance
from benchmarks.rows import Provenance
from bnext import _C

# Variables that change the allocator, launches or the compiler, and so the measurements.
ENVIRONMENT = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
)


def missing() -> str | None:
    """What --device cuda lacks here, in one line; None if nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    with warnings.catch_warnings():  # about a driver that is too old: the line below says so, too
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
    if not available:
        return f"no GPU is visible to torch {torch.__version__} (look at nvidia-smi and CUDA_VISIBLE_DEVICES)"
    if not _C.cuda:
        return "bnext was built without its CUDA kernels (python -m bnext says what was built)"
    return None


def driver_version() -> str:
    """The driver's version according to nvidia-smi; empty where that fails."""
    status, answer = subprocess.getstatusoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    return answer.split()[0] if status == 0 else ""  # the same for every GPU


def cuda_provenance(threads: int) -> Provenance:
    """The provenance of a run on the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return replace(
        provenance(threads),
        device="cuda",
        device_name=properties.name,
        isa=f"sm_{properties.major}{properties.minor}",
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        driver_version=driver_version(),
        cuda_version=torch.version.cuda or "",
        cudnn_version=str(torch.backends.cudnn.version() or ""),
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
    )
