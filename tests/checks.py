"""Compares a call of bnext with the reference: output, running statistics and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import reference
import tolerances
import torch
from cases import Parameters, make_grad, make_input, make_parameters, make_residual, parameter_dtype, without_repeats
from reference import Act
from tolerances import assert_within
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bnext.functional import batch_norm, batch_norm_act


def output_strides(input: Tensor) -> tuple[int, ...]:
    """The strides that torch's batch norm gives its output; (N, C, L) inputs in (N, L, C) memory keep their own."""
    channels = input.shape[1]
    # On a GPU torch gives some transposed inputs' strides to the output, where bnext does on every device as torch does
    # on the CPU.
    input = input.detach().cpu()
    if input.dim() == 3 and input.transpose(1, 2).is_contiguous() and not input.is_contiguous():
        return (channels * input.shape[2], 1, channels)
    mean, var = torch.zeros(channels), torch.ones(channels)
    mean, var = (t.double() if input.dtype == torch.float64 else t for t in (mean, var))
    return torch.nn.functional.batch_norm(input, mean, var).stride()


def significant_strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions of more than one element, since those of others mean nothing."""
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
    """act(batch_norm(input) + residual). Without a residual, an `act` of None is the plain operator."""
    if residual is None and act is None:
        return batch_norm(input, stats.running_mean, stats.running_var, weight, bias, training, momentum, eps)
    return batch_norm_act(
        input, stats.running_mean, stats.running_var, weight, bias, residual, training, momentum, eps, act
    )


def assert_predicts(op: object, args: Sequence[object], keywords: Mapping[str, object] | None = None) -> object:
    """Assert that the fake kernel predicts the results' shape, dtype, device and strides; returns the results."""
    keywords = keywords or {}
    with FakeTensorMode() as mode:
        fake = lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v  # noqa: E731
        predicted = op(*map(fake, args), **{key: fake(value) for key, value in keywords.items()})
    real = op(*args, **keywords)
    for a, b in zip(*([r] if isinstance(r, Tensor) else r for r in (predicted, real)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), op
        assert significant_strides(a) == significant_strides(b), op
    return real


class Inputs(NamedTuple):
    """The tensors of a call and of its backward pass."""

    input: Tensor
    grad_output: Tensor
    params: Parameters
    residual: Tensor | None = None


def make_inputs(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    has_residual: bool = False,
    grad_layout: str = "contiguous",
) -> Inputs:
    """Parameters are float32, for float64 data float64."""
    return Inputs(
        make_input(shape, layout, dtype, device),
        make_grad(shape, grad_layout, dtype, device),
        make_parameters(shape[1], parameter_dtype(dtype), device),
        make_residual(shape, without_repeats(layout), dtype, device) if has_residual else None,
    )


def expected_forward(
    input: Tensor, params: Parameters, training: bool, eps: float, residual: Tensor | None, act: Act
) -> reference.Forward:
    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    return reference.forward(input, params.weight, params.bias, eps=eps, **frozen, residual=residual, act=act)


def assert_output(
    y: Tensor,
    stats: Parameters,
    fwd: reference.Forward,
    input: Tensor,
    params: Parameters,
    training: bool,
    momentum: float,
    has_residual: bool,
    act: Act,
) -> None:
    """Check values, dtype and strides of the output, and the running statistics that the call left behind."""
    assert y.dtype == input.dtype
    assert y.stride() == output_strides(input)
    options = {"training": training, "has_residual": has_residual, "act": act}
    limit = tolerances.output(fwd, params.weight, params.bias, input.dtype, **options)
    assert_within(y, fwd.output, limit, "output")
    if training:
        expected = reference.updated_running_stats(*params[2:], fwd, momentum)
        limits = tolerances.running_stats(expected, fwd, momentum, input.dtype, *(t.dtype for t in params[2:]))
        assert_within(stats.running_mean, expected[0], limits[0], "running_mean")
        # A variance beyond the dtype's range is rounded to inf.
        largest = torch.finfo(params.running_var.dtype).max
        running_var = torch.where(expected[1] > largest, torch.inf, expected[1])
        assert_within(stats.running_var, running_var, limits[1], "running_var")
    else:
        assert torch.equal(stats.running_mean, params.running_mean)
        assert torch.equal(stats.running_var, params.running_var)


def check_forward(
    input: Tensor,
    params: Parameters,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: Act = None,
    fwd: reference.Forward | None = None,
) -> Tensor:
    """Check output (values, dtype, strides) and running statistics of one call; returns the output. `fwd` is what the
    reference gives for it, if that is known."""
    before = [None if t is None else t.detach().clone() for t in (input, residual)]
    stats = params.clone()
    y = call(input, stats, *params[:2], training, momentum, eps, residual, act)
    fwd = fwd or expected_forward(input, params, training, eps, residual, act)
    assert_output(y, stats, fwd, input, params, training, momentum, residual is not None, act)
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
    fwd: reference.Forward | None = None,
) -> tuple[Tensor, ...]:
    """Check the gradients (values, dtypes, strides) of input, weight, bias and residual, where given; returns them.

    With `output_too` also what check_forward looks at, without another call of the kernels.
    """
    stats, dtype, has_residual = params.clone(), input.dtype, residual is not None
    x, weight, bias, added = (
        None if t is None else t.detach().requires_grad_() for t in (input, params.weight, params.bias, residual)
    )
    y = call(x, stats, weight, bias, training, 0.1, eps, added, act)
    leaves = {"grad_input": x, "grad_weight": weight, "grad_bias": bias, "grad_residual": added}
    leaves = {what: leaf for what, leaf in leaves.items() if leaf is not None}
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_output), strict=True))

    fwd = fwd or expected_forward(input, params, training, eps, residual, act)
    if output_too:
        assert_output(y.detach(), stats, fwd, input, params, training, 0.1, has_residual, act)
    expected = reference.backward(grad_output, fwd, weight, training=training, act=act)
    reaching = expected.residual
    options = {"training": training, "has_residual": has_residual, "act": act}
    slack = tolerances.slack(grad_output, fwd, weight, bias, dtype, **options)
    limits = {
        "grad_input": lambda to: tolerances.grad_input(reaching, fwd, weight, to, training=training, slack=slack),
        "grad_weight": lambda to: tolerances.grad_weight(reaching, fwd, dtype, to, training=training, slack=slack),
        "grad_bias": lambda to: tolerances.grad_bias(reaching, dtype, to, slack),
        "grad_residual": lambda to: tolerances.grad_residual(reaching, slack, to, act),
    }
    for what, got in grads.items():
        to = leaves[what].dtype
        assert_within(got, getattr(expected, what.removeprefix("grad_")), limits[what](to), what)
        assert got.dtype == to, what
    if training or weight is not None:  # else the input is not kept, and the layout may be grad_output's
        assert significant_strides(grads["grad_input"]) == significant_strides(y), "grad_input has another layout"
    return tuple(grads.values())


def check_call(
    inputs: Inputs, *, training: bool, momentum: float = 0.1, eps: float = 1e-5, act: Act = None
) -> tuple[Tensor, ...]:
    """Check a call without a graph, then one with a graph, and backward; returns output and gradients."""
    x, grad_output, params, residual = inputs
    fwd = expected_forward(x, params, training, eps, residual, act)
    options = {"training": training, "eps": eps, "residual": residual, "act": act, "fwd": fwd}
    y = check_forward(x, params, momentum=momentum, **options)
    return y, *check_backward(x, grad_output, params, **options)
