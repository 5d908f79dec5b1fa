"""The providers that only a GPU has: torch without cuDNN, and bnext with other plans."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import operators
from benchmarks.operators import Provider
from benchmarks.suites import BNEXT, NO_CUDNN, PLANNED, PLANS, TORCH, Case
from bnext import _C

# Plans for devices with lower limits. They show the gain of large clusters, of clusters at all, of one block with all
# of an SM's memory, and of long runs of channels_last rows that are read twice.
LESS = ({"max_cluster": 8}, {"max_cluster": 1}, {"shared_per_block": 113 * 1024}, {"max_row_bytes": 64})
CAPS = dict(zip(PLANS, LESS, strict=True))


@contextmanager
def without_cudnn() -> Iterator[None]:
    """torch's own kernels. (torch.backends.cudnn.flags would set TF32 and benchmark anew as well.)

    Backward uses the kernels that its forward chose.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def planned(cap: dict[str, int]) -> Iterator[None]:
    """Launches and captures in this context are planned within these limits."""
    _C.cap_cuda_device(**cap)
    try:
        yield
    finally:
        _C.cap_cuda_device()


def make_provider(case: Case, name: str) -> Provider:
    functions = operators.functions(case.epilogue)
    if name == NO_CUDNN:
        return Provider(name, functions[TORCH], without_cudnn)
    if name.startswith(PLANNED):
        return Provider(name, functions[BNEXT], partial(planned, CAPS[name.removeprefix(PLANNED)]))
    return operators.make_provider(case, name)
