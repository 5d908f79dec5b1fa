"""One call of a batch norm: the arguments of a case, each provider's function, the copy of the same bytes."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812

from benchmarks.suites import BNEXT, TORCH, TORCH_COMPILE, Case
from benchmarks.timing import Call
from benchmarks.traffic import PLAIN, Epilogue
from bnext import functional

# Called with input, running_mean, running_var, weight, bias, the residual where there is one, training, momentum, eps.
BatchNorm = Callable[..., Tensor]
Activate = Callable[[Tensor], Tensor]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = 0
MOMENTUM, EPS = 0.1, 1e-5

ACTIVATIONS: dict[str, Activate] = {"relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}

# Backward of these needs only the result. In place, the others would first copy their argument for backward.
IN_PLACE: dict[str, Activate] = {"relu": partial(F.relu, inplace=True)}

GRADIENTS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")  # the last where there is a residual


@dataclass(frozen=True)
class Tensors:
    """The arguments of a case; for timing, input, weight, bias and residual require gradients."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    grad_output: Tensor
    residual: tuple[Tensor, ...] = ()  # one, or none

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.input, self.weight, self.bias, *self.residual

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Tensors":
        """The function of each."""
        *tensors, residual = (getattr(self, field.name) for field in fields(self))
        return Tensors(*map(function, tensors), tuple(map(function, residual)))


def make_tensors(case: Case, device: str = "cpu") -> Tensors:
    """Random arguments, written here, so that no call pays for the first touch of an input.

    Parameters and statistics of 16-bit inputs are float32, as under autocast.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    dtype: torch.dtype = getattr(torch, case.dtype)
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    channels = case.shape[1]

    def data() -> Tensor:
        values = torch.empty(case.shape, dtype=dtype, device=device).normal_(generator=generator)
        if case.layout == "contiguous":
            return values
        return values.movedim(1, -1).contiguous().movedim(-1, 1)  # sequences, too

    def param(low: float, high: float) -> Tensor:
        return torch.empty(channels, dtype=param_dtype, device=device).uniform_(low, high, generator=generator)

    return Tensors(
        input=data().requires_grad_(),
        weight=param(0.5, 1.5).requires_grad_(),
        bias=param(-0.5, 0.5).requires_grad_(),
        running_mean=param(-0.1, 0.1),
        running_var=param(0.9, 1.1),
        grad_output=data(),
        residual=(data().requires_grad_(),) if case.epilogue.residual else (),
    )


# The providers.


@dataclass(frozen=True)
class Provider:
    """A batch norm with its epilogue, and the context that it is called in."""

    name: str
    function: BatchNorm
    context: Callable[[], AbstractContextManager[object]] = nullcontext


def eager(epilogue: Epilogue) -> BatchNorm:
    """torch's operators one after the other, in place where eager code usually is."""
    return F.batch_norm if epilogue == PLAIN else expression(epilogue, Tensor.add_, {**ACTIVATIONS, **IN_PLACE})


def out_of_place(epilogue: Epilogue) -> BatchNorm:
    """The same without operators in place, as it is written for a compiler."""
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

    The cache is emptied because after a few shapes torch would fall back to eager mode; with fullgraph it would raise.
    """
    import torch._functorch.config as aot_config

    # Backward runs many times on one graph. Code compiled earlier, which torch may find in its cache on disk, refuses
    # that if it may reuse the memory of saved tensors. This is the setting that the error message names.
    aot_config.donated_buffer = False
    torch.compiler.reset()
    return torch.compile(out_of_place(epilogue), backend=backend, dynamic=False, fullgraph=True)


def fused(epilogue: Epilogue) -> BatchNorm:
    """bnext's one call."""
    act = epilogue.act
    if epilogue == PLAIN:
        return functional.batch_norm
    if epilogue.residual:
        return partial(functional.batch_norm_act, act=act)

    def batch_norm_act(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *how: float) -> Tensor:
        return functional.batch_norm_act(input, mean, var, weight, bias, None, *how, act)

    return batch_norm_act


def functions(epilogue: Epilogue) -> dict[str, BatchNorm]:
    """The batch norms of every device, by provider."""
    return {TORCH: eager(epilogue), BNEXT: fused(epilogue)}


def make_provider(case: Case, name: str) -> Provider:
    """A provider that is measured on every device; raises torch's error where it cannot compile."""
    return Provider(name, compiled(case.epilogue) if name == TORCH_COMPILE else functions(case.epilogue)[name])


# The calls.


def forward(function: BatchNorm, tensors: Tensors, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """A training step's call: batch statistics, running statistics updated in place, a graph recorded."""
    t = tensors
    return function(t.input, running_mean, running_var, t.weight, t.bias, *t.residual, True, MOMENTUM, EPS)


def backward(output: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    """The gradients of the leaves; the graph is kept, so that backward can run again."""
    return torch.autograd.grad(output, tensors.leaves, tensors.grad_output, retain_graph=True)


def evaluate(function: BatchNorm, tensors: Tensors) -> Tensor:
    """An inference call: running statistics, read only."""
    t = tensors
    return function(t.input, t.running_mean, t.running_var, t.weight, t.bias, *t.residual, False, MOMENTUM, EPS)


def results(function: BatchNorm, tensors: Tensors) -> dict[str, Tensor]:
    """Everything a training call, its backward and an inference call return or update."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    output = forward(function, tensors, running_mean, running_var)
    return {
        "output": output.detach(),
        "running_mean": running_mean,
        "running_var": running_var,
        **dict(zip(GRADIENTS, backward(output, tensors), strict=False)),
        "eval output": evaluate(function, tensors.mapped(Tensor.detach)),
    }


def provider_call(operation: str, function: BatchNorm, tensors: Tensors) -> Call:
    """One provider's operation; each call allocates its results, as a user's call does."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    if operation == "forward":
        return lambda: forward(function, tensors, running_mean, running_var)
    if operation == "backward":
        output = forward(function, tensors, running_mean, running_var)
        return lambda: backward(output, tensors)
    if operation == "eval":
        detached = tensors.mapped(Tensor.detach)  # as under torch.no_grad()
        return lambda: evaluate(function, detached)
    return lambda: backward(forward(function, tensors, running_mean, running_var), tensors)


def floor_call(operation: str, tensors: Tensors) -> Call:
    """The same bytes moved by torch's copy and addition into outputs that are allocated and touched once, here.

    So the floor is what the traffic costs, without page faults; --touched spares the providers the faults, too.
    """
    x, grad_output = tensors.input.detach(), tensors.grad_output
    output = torch.zeros_like(x)
    copy: Call = partial(output.copy_, x)
    add: Call = partial(torch.add, x, grad_output, out=output)
    steps = {"forward": [copy], "backward": [add], "eval": [copy]}
    if tensors.residual:
        # Half of the mask is read and half written.
        bits = torch.ones(-(-x.numel() // 16), dtype=torch.uint8, device=x.device)
        copy_mask: Call = partial(torch.zeros_like(bits).copy_, bits)
        copy_gradient: Call = partial(torch.zeros_like(x).copy_, grad_output)
        steps = {"forward": [add, copy_mask], "backward": [copy, copy_gradient, copy_mask], "eval": [add]}
    steps["forward_backward"] = [*steps["forward"], *steps["backward"]]
    chosen = steps[operation]
    return chosen[0] if len(chosen) == 1 else lambda: tuple(step() for step in chosen)


# The memory that an autograd graph holds.


class Saved:
    """What the graph keeps in place of a tensor, for as long as the node lives.

    It holds only the tensor's memory: a node that saves its own result would keep itself alive through the tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()


def held(function: BatchNorm, tensors: Tensors) -> dict[str, int]:
    """Bytes that the graph of a training call holds as saved tensors: the caller's, the result's, and those that only
    backward needs. Each storage is counted once and whole.
    """
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    alive: WeakSet[Saved] = WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: None):  # this graph runs no backward
        output = forward(function, tensors, running_mean, running_var)
    storages = {saved.storage.data_ptr(): saved.storage.nbytes() for saved in alive}
    arguments = {tensor.untyped_storage().data_ptr() for tensor in (*tensors.leaves, running_mean, running_var)}
    of_arguments = sum(size for address, size in storages.items() if address in arguments)
    of_result = storages.get(output.untyped_storage().data_ptr(), 0)
    return {
        "held_arguments_bytes": of_arguments,
        "held_result_bytes": of_result,
        "held_bytes": sum(storages.values()) - of_arguments - of_result,
    }
