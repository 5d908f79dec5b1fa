"""One call of bnext against the reference: the comparison that the forward, backward and property tests share."""

from __future__ import annotations

import reference
import tolerances
import torch
from cases import Parameters
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act


def output_strides(input: Tensor) -> tuple[int, ...]:
    """The strides that torch's own batch norm gives its output."""
    channels = input.shape[1]
    mean, var = torch.zeros(channels, device=input.device), torch.ones(channels, device=input.device)
    mean, var = (t.double() if input.dtype == torch.float64 else t for t in (mean, var))
    return torch.nn.functional.batch_norm(input.detach(), mean, var).stride()


def significant_strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that hold more than one element: the others address nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def call(
    input: Tensor,
    stats: Parameters,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = None,
) -> Tensor:
    """The plain op, or the fused one where a residual or an activation (the identity, by name) is given."""
    if residual is None and act is None:
        return batch_norm(input, stats.running_mean, stats.running_var, weight, bias, training, momentum, eps)
    return batch_norm_act(
        input, stats.running_mean, stats.running_var, weight, bias, residual, training, momentum, eps, act
    )


Affine = tuple[Tensor | None, Tensor | None]


def expected_forward(
    input: Tensor, params: Parameters, affine: Affine, training: bool, eps: float, residual: Tensor | None, act: Act
) -> reference.Forward:
    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    return reference.forward(input, *affine, eps=eps, **frozen, residual=residual, act=act)


def assert_output(
    y: Tensor,
    stats: Parameters,
    fwd: reference.Forward,
    input: Tensor,
    params: Parameters,
    affine: Affine,
    training: bool,
    momentum: float,
    residual: Tensor | None,
    act: Act,
) -> None:
    """Values, dtype and strides of the output, and the running statistics that the call left behind."""
    assert y.dtype == input.dtype
    assert y.stride() == output_strides(input)
    limit = tolerances.output(fwd, *affine, input.dtype, training=training, has_residual=residual is not None, act=act)
    assert_within(y, fwd.output, limit, "output")
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


def check_forward(
    input: Tensor,
    params: Parameters,
    *,
    training: bool,
    affine: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = None,
) -> Tensor:
    """Output (values, dtype, strides) and running statistics of one call; returns the output."""
    before = [None if t is None else t.detach().clone() for t in (input, residual)]
    stats = params.clone()
    weight, bias = (params.weight, params.bias) if affine else (None, None)
    y = call(input, stats, weight, bias, training, momentum, eps, residual, act)

    fwd = expected_forward(input, params, (weight, bias), training, eps, residual, act)
    assert_output(y, stats, fwd, input, params, (weight, bias), training, momentum, residual, act)
    for what, tensor, kept in zip(("input", "residual"), (input, residual), before, strict=True):
        assert tensor is None or torch.equal(tensor, kept), f"{what} was written to"
    return y


def check_backward(
    input: Tensor,
    grad_output: Tensor,
    params: Parameters,
    *,
    training: bool,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = None,
    output_too: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients (values, dtypes, strides) of input, weight, bias and, where it is given, residual; returns them.

    `output_too`: and what check_forward looks at, without another call of the kernels.
    """
    x = input.detach().requires_grad_()
    weight, bias = (t.detach().clone().requires_grad_() for t in (params.weight, params.bias))
    added = None if residual is None else residual.detach().requires_grad_()
    leaves = [t for t in (x, weight, bias, added) if t is not None]
    stats = params.clone()
    y = call(x, stats, weight, bias, training, 0.1, eps, added, act)
    grads = torch.autograd.grad(y, leaves, grad_output)

    fwd = expected_forward(input, params, (weight, bias), training, eps, residual, act)
    if output_too:
        assert_output(y.detach(), stats, fwd, input, params, (weight, bias), training, 0.1, residual, act)
    expected = reference.backward(grad_output, fwd, weight, training=training, act=act)
    reaching = expected.residual
    slack = tolerances.slack(
        grad_output, fwd, weight, bias, input.dtype, training=training, has_residual=residual is not None, act=act
    )
    limits = (
        tolerances.grad_input(reaching, fwd, weight, input.dtype, training=training, slack=slack),
        tolerances.grad_weight(reaching, fwd, input.dtype, weight.dtype, training=training, slack=slack),
        tolerances.grad_bias(reaching, input.dtype, bias.dtype, slack),
        tolerances.grad_residual(reaching, slack, input.dtype, act),
    )
    names = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    for what, got, want, limit in zip(names, grads, expected, limits, strict=False):
        assert_within(got, want, limit, what)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    assert significant_strides(grads[0]) == significant_strides(y), "grad_input keeps the layout of the output"
    return grads
