"""What is compared: torch as a user writes it, torch.compile of the same, bnext."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.operations import BatchNorm
from benchmarks.report import TORCH_COMPILE
from benchmarks.suites import PLAIN, Case, Epilogue
from bnext import functional

REFERENCE = "torch"

# Of a plain batch norm, and for every other those that are required: a case without one of them gets no number.
PROVIDERS: dict[str, BatchNorm] = {
    REFERENCE: F.batch_norm,
    "bnext": functional.batch_norm,
}

Activate = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activate] = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}

# Of these backward needs only the result; in place, the others would first copy their argument for it.
IN_PLACE: dict[str, Activate] = {"relu": partial(F.relu, inplace=True)}


@dataclass(frozen=True)
class Provider:
    """A batch norm with what follows it, and what has to be set while it is called."""

    name: str
    function: BatchNorm
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def eager(epilogue: Epilogue) -> BatchNorm:
    """torch's operators one after the other, in place where a user of eager mode has them so."""
    if epilogue == PLAIN:
        return F.batch_norm
    activate = IN_PLACE.get(epilogue.act, ACTIVATIONS[epilogue.act])

    def batch_norm_act(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        return activate(F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps))

    def batch_norm_add_act(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return activate(output.add_(residual))

    return batch_norm_add_act if epilogue.residual else batch_norm_act


def out_of_place(epilogue: Epilogue) -> BatchNorm:
    """The same without a tensor that is changed, as it is written for a compiler."""

    def batch_norm(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        *rest: Tensor | bool | float,
    ) -> Tensor:
        *residual, training, momentum, eps = rest
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        for addend in residual:
            output = output + addend
        return ACTIVATIONS[epilogue.act](output) if epilogue.act else output

    return batch_norm


def compiled(epilogue: Epilogue = PLAIN, backend: str = "inductor") -> BatchNorm:
    """torch.compile of torch's functions, from an empty cache of compiled code.

    Emptied, because after a few shapes torch would go back to eager mode; fullgraph, so that it would say so.
    """
    import torch._functorch.config as aot_config

    # One graph is asked for its backward again and again; one compiled before, which torch may find in its cache on
    # disk, refuses that where it may reuse the memory of saved tensors. The setting is the one that the refusal names.
    aot_config.donated_buffer = False
    torch.compiler.reset()
    return torch.compile(out_of_place(epilogue), backend=backend, dynamic=False, fullgraph=True)


def fused(epilogue: Epilogue) -> BatchNorm:
    """bnext's one call."""
    act = epilogue.act

    def batch_norm_act(
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        return functional.batch_norm_act(
            input, running_mean, running_var, weight, bias, None, training, momentum, eps, act
        )

    return partial(functional.batch_norm_act, act=act) if epilogue.residual else batch_norm_act


def functions(epilogue: Epilogue) -> dict[str, BatchNorm]:
    """What is compared on every device, by name."""
    return dict(PROVIDERS) if epilogue == PLAIN else {REFERENCE: eager(epilogue), "bnext": fused(epilogue)}


def provider_makers(case: Case, with_compile: bool) -> dict[str, Callable[[], Provider]]:
    """What to compare on a case, by name; made when called, as making one may fail where the compiler is missing."""
    makers: dict[str, Callable[[], Provider]] = {
        name: partial(Provider, name, function) for name, function in functions(case.epilogue).items()
    }
    if with_compile and case.compiled:
        makers[TORCH_COMPILE] = lambda: Provider(TORCH_COMPILE, compiled(case.epilogue))
    return makers
