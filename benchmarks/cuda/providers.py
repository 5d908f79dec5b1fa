"""What is compared on a GPU beside what is compared everywhere: torch without cuDNN, bnext planned otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import providers
from benchmarks.providers import Provider, eager
from benchmarks.suites import NO_CUDNN, PLANNED, TORCH_COMPILE, Case
from bnext import _C

# As for a lesser device: what large clusters, clusters at all, and one block with all of an SM's memory bring.
PLANS = {
    "clusters-of-8": {"max_cluster": 8},
    "no-clusters": {"max_cluster": 1},
    "half-memory": {"shared_per_block": 113 * 1024},
}


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


def provider_makers(case: Case, with_compile: bool, with_plans: bool = False) -> dict[str, Callable[[], Provider]]:
    """What to compare on a case, by name; torch.compile, which may fail, is the last."""
    makers = providers.provider_makers(case, with_compile)
    last = {name: makers.pop(name) for name in (TORCH_COMPILE,) if name in makers}
    makers[NO_CUDNN] = partial(Provider, NO_CUDNN, eager(case.epilogue), without_cudnn)
    for name, cap in PLANS.items() if with_plans else ():
        function = providers.functions(case.epilogue)["bnext"]
        makers[PLANNED + name] = partial(Provider, PLANNED + name, function, partial(planned, cap))
    return {**makers, **last}
