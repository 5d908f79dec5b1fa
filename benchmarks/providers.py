"""What is compared: torch as a user writes it, torch.compile of the same, bnext."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.operations import BatchNorm
from benchmarks.suites import BNEXT, PLAIN, TORCH, TORCH_COMPILE, Case, Epilogue
from bnext import functional

# Of a plain batch norm, and for every other those that are required: a case without one of them gets no number.
PROVIDERS: dict[str, BatchNorm] = {
    TORCH: F.batch_norm,
    BNEXT: functional.batch_norm,
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
    return F.batch_norm if epilogue == PLAIN else expression(epilogue, Tensor.add_, {**ACTIVATIONS, **IN_PLACE})


def out_of_place(epilogue: Epilogue) -> BatchNorm:
    """The same without a tensor that is changed, as it is written for a compiler."""
    return expression(epilogue, torch.add, ACTIVATIONS)


def expression(
    epilogue: Epilogue, add: Callable[[Tensor, Tensor], Tensor], activations: Mapping[str, Activate]
) -> BatchNorm:
    activate = activations.get(epilogue.act)

    def batch_norm(
        input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor | bool | float
    ) -> Tensor:
        *residual, training, momentum, eps = rest
        output = F.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
        for addend in residual:
            output = add(output, addend)
        return activate(output) if activate else output

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
    if epilogue.residual:
        return partial(functional.batch_norm_act, act=act)

    def batch_norm_act(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *how: float) -> Tensor:
        return functional.batch_norm_act(input, mean, var, weight, bias, None, *how, act)

    return batch_norm_act


def functions(epilogue: Epilogue) -> dict[str, BatchNorm]:
    """What is compared on every device, by name."""
    return dict(PROVIDERS) if epilogue == PLAIN else {TORCH: eager(epilogue), BNEXT: fused(epilogue)}


def provider_makers(case: Case, with_compile: bool) -> dict[str, Callable[[], Provider]]:
    """What to compare on a case, by name; made when called, as making one may fail where the compiler is missing."""
    makers: dict[str, Callable[[], Provider]] = {
        name: partial(Provider, name, function) for name, function in functions(case.epilogue).items()
    }
    if with_compile and case.compiled:
        makers[TORCH_COMPILE] = lambda: Provider(TORCH_COMPILE, compiled(case.epilogue))
    return makers
