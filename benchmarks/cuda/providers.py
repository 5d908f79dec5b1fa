"""What is compared on a GPU: torch with and without cuDNN, torch.compile, bnext."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.operations import PROVIDERS, BatchNorm
from benchmarks.report import NO_CUDNN, TORCH_COMPILE
from benchmarks.suites import DEVICE_SUITES, Case


@dataclass(frozen=True)
class Provider:
    """A batch norm, and what has to be set while it is called."""

    name: str
    function: BatchNorm
    context: Callable[[], AbstractContextManager[object]] = nullcontext


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


def compiled(backend: str = "inductor") -> BatchNorm:
    """torch.compile of torch's function, from an empty cache of compiled code.

    Emptied, because after a few shapes torch would go back to eager mode; fullgraph, so that it would say so.
    """
    import torch._functorch.config as aot_config

    # One graph is asked for its backward again and again; one compiled before, which torch may find in its cache on
    # disk, refuses that where it may reuse the memory of saved tensors. The setting is the one that the refusal names.
    aot_config.donated_buffer = False
    torch.compiler.reset()

    def batch_norm(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return torch.compile(batch_norm, backend=backend, dynamic=False, fullgraph=True)


def is_compiled(case: Case) -> bool:
    """Whether torch.compile is measured on the case: each takes seconds to compile."""
    return case.dtype == "bfloat16" and case.shape in DEVICE_SUITES["cuda"][case.suite].compiled


def provider_makers(case: Case, with_compile: bool) -> dict[str, Callable[[], Provider]]:
    """What to compare on a case, by name; made when called, as making one may fail where the compiler is missing."""
    makers = {name: partial(Provider, name, function) for name, function in PROVIDERS.items()}
    makers[NO_CUDNN] = partial(Provider, NO_CUDNN, torch.nn.functional.batch_norm, without_cudnn)
    if with_compile and is_compiled(case):
        return {**makers, TORCH_COMPILE: lambda: Provider(TORCH_COMPILE, compiled())}
    return dict(makers)
