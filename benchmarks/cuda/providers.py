"""What is compared on a GPU beside what is compared everywhere: torch without cuDNN, bnext planned otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import operators
from benchmarks.operators import Provider
from benchmarks.suites import BNEXT, NO_CUDNN, PLANNED, PLANS, TORCH, Case
from bnext import _C

# As for a lesser device: what large clusters, clusters at all, one block with all of an SM's memory, and long runs of
# channels_last rows that are read twice bring.
LESS = ({"max_cluster": 8}, {"max_cluster": 1}, {"shared_per_block": 113 * 1024}, {"max_row_bytes": 64})
CAPS = dict(zip(PLANS, LESS, strict=True))


@contextmanager
def without_cudnn() -> Iterator[None]:
    """torch's own kernels. (torch.backends.cudnn.flags would set TF32 and benchmark anew as well.)

    What the forward chose, its backward keeps.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


@contextmanager
def planned(cap: dict[str, int]) -> Iterator[None]:
    """Launches, and captures of them, are planned as if the device had no more."""
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
