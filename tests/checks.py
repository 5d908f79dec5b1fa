"""One call of bnext against the reference: the comparison that the forward, backward and property tests share."""

from __future__ import annotations

import reference
import tolerances
import torch
from cases import Parameters
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm


def output_strides(input: Tensor) -> tuple[int, ...]:
    """The strides that torch's own batch norm gives its output."""
    channels = input.shape[1]
    mean, var = torch.zeros(channels, device=input.device), torch.ones(channels, device=input.device)
    mean, var = (t.double() if input.dtype == torch.float64 else t for t in (mean, var))
    return torch.nn.functional.batch_norm(input.detach(), mean, var).stride()


def significant_strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that hold more than one element: the others address nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def check_forward(
    input: Tensor,
    params: Parameters,
    *,
    training: bool,
    affine: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Output (values, dtype, strides) and running statistics of one call; returns the output."""
    before = input.detach().clone()
    stats = params.clone()
    weight, bias = (params.weight, params.bias) if affine else (None, None)
    y = batch_norm(input, stats.running_mean, stats.running_var, weight, bias, training, momentum, eps)

    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    fwd = reference.forward(input, weight, bias, eps=eps, **frozen)
    assert y.dtype == input.dtype
    assert y.stride() == output_strides(input)
    assert_within(y, fwd.output, tolerances.output(fwd, weight, bias, input.dtype, training=training), "output")

    if training:
        expected = reference.updated_running_stats(params.running_mean, params.running_var, fwd, momentum)
        limits = tolerances.running_stats(
            expected, fwd, momentum, input.dtype, params.running_mean.dtype, params.running_var.dtype
        )
        assert_within(stats.running_mean, expected[0], limits[0], "running_mean")
        assert_within(stats.running_var, expected[1], limits[1], "running_var")
    else:
        assert torch.equal(stats.running_mean, params.running_mean)
        assert torch.equal(stats.running_var, params.running_var)
    assert torch.equal(input, before), "input was written to"
    return y


def check_backward(
    input: Tensor, grad_output: Tensor, params: Parameters, *, training: bool, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (values, dtypes, strides) of input, weight and bias; returns them."""
    x = input.detach().requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (params.weight, params.bias))
    stats = params.clone()
    y = batch_norm(x, stats.running_mean, stats.running_var, weight, bias, training, 0.1, eps)
    grads = torch.autograd.grad(y, (x, weight, bias), grad_output)

    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    fwd = reference.forward(input, weight, bias, eps=eps, **frozen)
    expected = reference.backward(grad_output, fwd, weight, training=training)
    limits = (
        tolerances.grad_input(grad_output, fwd, weight, input.dtype, training=training),
        tolerances.grad_weight(grad_output, fwd, input.dtype, weight.dtype, training=training),
        tolerances.grad_bias(grad_output, input.dtype, bias.dtype),
    )
    for what, got, want, limit in zip(("grad_input", "grad_weight", "grad_bias"), grads, expected, limits, strict=True):
        assert_within(got, want, limit, what)
    assert [g.dtype for g in grads] == [input.dtype, weight.dtype, bias.dtype]
    assert significant_strides(grads[0]) == significant_strides(y), "grad_input keeps the layout of the output"
    return grads
