"""What one call is: the tensors of a case, and each provider's operations on them, ready to be timed."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.suites import Case
from benchmarks.timing import Call

# Called with input, running_mean, running_var, weight, bias, the residual where there is one, training, momentum, eps.
BatchNorm = Callable[..., Tensor]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = 0
MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Tensors:
    """The arguments of a case; where these are timed, input, weight, bias and residual require gradients."""

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
        singles = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "residual"}
        results = {name: function(tensor) for name, tensor in singles.items()}
        return Tensors(**results, residual=tuple(map(function, self.residual)))

    def detached(self) -> "Tensors":
        """The same memory without gradients: what inference under torch.no_grad() works on."""
        return self.mapped(Tensor.detach)


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
        residual=(data().requires_grad_(),) if case.epilogue.residual else (),
    )


def forward(function: BatchNorm, tensors: Tensors, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """A training step's call: batch statistics, running statistics updated in place, a graph recorded."""
    t = tensors
    return function(t.input, running_mean, running_var, t.weight, t.bias, *t.residual, True, MOMENTUM, EPS)


def backward(output: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    """The gradients of the leaves; the graph is kept, so that it can be asked again."""
    return torch.autograd.grad(output, tensors.leaves, tensors.grad_output, retain_graph=True)


def evaluate(function: BatchNorm, tensors: Tensors) -> Tensor:
    """An inference call: running statistics, read only."""
    t = tensors
    return function(t.input, t.running_mean, t.running_var, t.weight, t.bias, *t.residual, False, MOMENTUM, EPS)


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

    Their outputs are allocated and touched once, here: the floor is what the traffic costs, without page
    faults. MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=30000000000 spares the providers the faults too.
    """
    x, grad_output = tensors.input.detach(), tensors.grad_output
    output = torch.zeros_like(x)

    def copy() -> Tensor:
        return output.copy_(x)

    def add() -> Tensor:
        return torch.add(x, grad_output, out=output)

    steps: dict[str, tuple[Call, ...]] = {"forward": (copy,), "backward": (add,), "eval": (copy,)}
    if tensors.residual:
        grad_residual = torch.zeros_like(x)
        # Half of the mask read and half written.
        bits = torch.ones(-(-x.numel() // 16), dtype=torch.uint8, device=x.device)
        mask = torch.zeros_like(bits)

        def copy_gradient() -> Tensor:
            return grad_residual.copy_(grad_output)

        def copy_mask() -> Tensor:
            return mask.copy_(bits)

        steps = {"forward": (add, copy_mask), "backward": (copy, copy_gradient, copy_mask), "eval": (add,)}
    steps["forward_backward"] = (*steps["forward"], *steps["backward"])
    chosen = steps[operation]
    return chosen[0] if len(chosen) == 1 else lambda: tuple(step() for step in chosen)
