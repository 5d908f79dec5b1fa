"""What is compared on a GPU beside what is compared everywhere: torch without cuDNN."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks import providers
from benchmarks.providers import Provider, eager
from benchmarks.report import NO_CUDNN, TORCH_COMPILE
from benchmarks.suites import Case


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


def provider_makers(case: Case, with_compile: bool) -> dict[str, Callable[[], Provider]]:
    """What to compare on a case, by name; torch.compile, which may fail, is the last."""
    makers = providers.provider_makers(case, with_compile)
    last = {name: makers.pop(name) for name in (TORCH_COMPILE,) if name in makers}
    return {**makers, NO_CUDNN: partial(Provider, NO_CUDNN, eager(case.epilogue), without_cudnn), **last}
