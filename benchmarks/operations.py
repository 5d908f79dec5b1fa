"""What one call is: the tensors of a case, and each provider's operations on them, ready to be timed."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.suites import Case
from benchmarks.timing import Call
from bnext import functional

BatchNorm = Callable[..., Tensor]

REFERENCE = "torch"
PROVIDERS: dict[str, BatchNorm] = {
    REFERENCE: torch.nn.functional.batch_norm,
    "bnext": functional.batch_norm,
}
FLOOR = "copy"

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = 0


@dataclass(frozen=True)
class Tensors:
    """The arguments of a case; input, weight and bias are leaves that require gradients, as in training."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    grad_output: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input, self.weight, self.bias

    def detached(self) -> "Tensors":
        """The same memory without gradients: what inference under torch.no_grad() works on."""
        return Tensors(**{field.name: getattr(self, field.name).detach() for field in fields(self)})


def make_tensors(case: Case, device: str = "cpu") -> Tensors:
    """Random arguments, written once here, so that no call pays for the first touch of an input.

    Parameters and statistics of 16-bit inputs are float32, as a user of autocast has them.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    dtype: torch.dtype = getattr(torch, case.dtype)
    param_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    channels = case.shape[1]

    def data() -> Tensor:
        values = torch.empty(case.shape, dtype=dtype, device=device).normal_(generator=generator)
        return values.contiguous(memory_format=MEMORY_FORMATS[case.layout])

    def param(low: float, high: float) -> Tensor:
        return torch.empty(channels, dtype=param_dtype, device=device).uniform_(low, high, generator=generator)

    return Tensors(
        input=data().requires_grad_(),
        weight=param(0.5, 1.5).requires_grad_(),
        bias=param(-0.5, 0.5).requires_grad_(),
        running_mean=param(-0.1, 0.1),
        running_var=param(0.9, 1.1),
        grad_output=data(),
    )


def forward(function: BatchNorm, tensors: Tensors, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """A training step's call: batch statistics, running statistics updated in place, a graph recorded."""
    return function(tensors.input, running_mean, running_var, tensors.weight, tensors.bias, True, 0.1, 1e-5)


def backward(output: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    """The gradients of input, weight and bias; the graph is kept, so that it can be asked again."""
    return torch.autograd.grad(output, tensors.leaves, tensors.grad_output, retain_graph=True)


def evaluate(function: BatchNorm, tensors: Tensors) -> Tensor:
    """An inference call: running statistics, read only."""
    running_mean, running_var = tensors.running_mean, tensors.running_var
    return function(tensors.input, running_mean, running_var, tensors.weight, tensors.bias, False, 0.1, 1e-5)


def provider_call(operation: str, function: BatchNorm, tensors: Tensors) -> Call:
    """One provider's operation; each call allocates its results, as a user's call does."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    if operation == "forward":
        return lambda: forward(function, tensors, running_mean, running_var)
    if operation == "backward":
        output = forward(function, tensors, running_mean, running_var)
        return lambda: backward(output, tensors)
    if operation == "eval":
        detached = tensors.detached()
        return lambda: evaluate(function, detached)
    if operation == "forward_backward":
        return lambda: backward(forward(function, tensors, running_mean, running_var), tensors)
    raise ValueError(f"no operation {operation!r}")


def floor_call(operation: str, tensors: Tensors) -> Call:
    """The same bytes moved by torch's own copy and addition.

    Their output is allocated and touched once, here: the floor is what the traffic costs, without page
    faults. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 spares the providers the faults too.
    """
    x, grad_output = tensors.input.detach(), tensors.grad_output
    output = torch.zeros_like(x)

    def copy() -> Tensor:
        return output.copy_(x)

    def add() -> Tensor:
        return torch.add(x, grad_output, out=output)

    calls: dict[str, Call] = {
        "forward": copy,
        "backward": add,
        "eval": copy,
        "forward_backward": lambda: (copy(), add()),
    }
    return calls[operation]


def operation_calls(operation: str, tensors: Tensors) -> dict[str, Call]:
    """The calls to be timed against each other, by provider."""
    calls = {name: provider_call(operation, function, tensors) for name, function in PROVIDERS.items()}
    return {**calls, FLOOR: floor_call(operation, tensors)}
