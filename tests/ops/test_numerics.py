"""Accuracy far from zero, at both ends of the range, and in half precision."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    DENSE_CASES,
    FEW_ACTS,
    FEW_CASES,
    LOW_PRECISION,
    Case,
    Parameters,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    pairwise,
    parameter_dtype,
    to_layout,
)
from checks import Inputs, call, check_call, expected_forward, make_inputs
from marks import EACH_DTYPE, EVERY_ACT, FLAGS, in_emulation, pairs, rows
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels

# The largest errors allowed: of an output up to 4, and of grad_input relative to its largest value.
OUTPUT_BAR = 2e-6
GRAD_BAR = 1e-5

# 16,384 elements a channel in every layout.
BAR_CASES = [
    Case((16384, 3), "contiguous"),
    Case((16384, 3), "transposed"),
    Case((64, 3, 256), "contiguous"),
    Case((16, 5, 32, 32), "contiguous"),
    Case((16, 5, 32, 32), "channels_last"),
    Case((16, 5, 32, 32), "sliced"),
    Case((16, 5, 32, 32), "transposed"),
    Case((16, 5, 32, 32), "offset"),
    Case((4, 3, 16, 16, 16), "contiguous"),
    Case((4, 3, 16, 16, 16), "channels_last_3d"),
]
WIDE_CASE = Case((16, 67, 32, 32), "channels_last")
# The kernels differ by layout and alignment: two of the large cases are enough in emulation.
EMULATED_CASES = [*FEW_CASES, *BAR_CASES[3:5]]
BARS = pytest.mark.parametrize("case", in_emulation(EMULATED_CASES, BAR_CASES), ids=name)


def train_and_differentiate(x: Tensor, g: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and grad_input of batch norm in training mode without running statistics."""
    leaf = x.detach().requires_grad_()
    y = batch_norm(leaf, None, None, weight, training=True)
    return y.detach(), torch.autograd.grad(y, leaf, g)[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected value."""
    return float((reference.widen(actual) - expected).abs().max() / expected.abs().max())


def assert_bars(x: Tensor, g: Tensor) -> None:
    y, grad = train_and_differentiate(x, g)
    fwd = reference.forward(x)
    # The bar is absolute for |y| up to 4, and relative for larger values.
    assert_within(y, fwd.output, OUTPUT_BAR * (fwd.output.abs() / 4).clamp(min=1), "output")
    assert relative_error(grad, reference.backward(g, fwd, training=True).input) <= GRAD_BAR


@pytest.mark.parametrize("mean", [0.0, 1e2, -1e2, 1e4, 1e5], ids="mean={:g}".format)
@pytest.mark.parametrize("case", in_emulation([*EMULATED_CASES, WIDE_CASE], [*BAR_CASES, WIDE_CASE]), ids=name)
def test_offset_does_not_cost_accuracy(case: Case, mean: float, device: str) -> None:
    x = to_layout(torch.randn(case.shape, device=device) + mean, case.layout)
    assert_bars(x, make_grad(case.shape, device=device))


@pytest.mark.parametrize("mean", [0.0, 1e5], ids="mean={:g}".format)
@pytest.mark.parametrize("case", BAR_CASES[3:5], ids=name)
def test_offset_does_not_cost_accuracy_on_any_instruction_set(case: Case, mean: float, isa: str) -> None:
    x = to_layout(torch.randn(case.shape) + mean, case.layout)
    assert_bars(x, make_grad(case.shape))


ACTIVATED_CASES = (
    Case((4096, 3), "contiguous"),
    Case((16, 5, 16, 16), "contiguous"),
    Case((16, 5, 16, 16), "channels_last"),
    Case((16, 5, 16, 16), "sliced"),
)


@pytest.mark.not_emulated
@pairs(case=ACTIVATED_CASES, mean=(0.0, 1e2, -1e5), act=FEW_ACTS, has_residual=FLAGS)
def test_offset_does_not_cost_accuracy_before_an_activation(
    case: Case, mean: float, act: Act, has_residual: bool, device: str
) -> None:
    # 1.5 is the steepest slope of any activation.
    x = to_layout(torch.randn(case.shape, device=device) + mean, case.layout)
    residual = make_residual(*case, device=device) if has_residual else None
    y = batch_norm_act(x, None, None, residual=residual, training=True, act=act)
    fwd = reference.forward(x, residual=residual, act=act)
    assert_within(y, fwd.output, 1.5 * OUTPUT_BAR * (fwd.z.abs() / 4).clamp(min=1), "output")
    params = make_parameters(case.shape[1], device=device)
    inputs = Inputs(x, make_grad(case.shape, device=device), params, residual)
    check_call(inputs, training=True, act=act)


@pytest.mark.parametrize(("act", "has_residual"), [(None, False), (None, True), ("relu", False), ("hardswish", True)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_roundings_of_many_values_do_not_add_up(layout: str, act: Act, has_residual: bool, device: str) -> None:
    # Values minus a shift that is finer than they are would all be rounded to the same side. The derivative of these
    # activations is 1 where z is 6 or so: grad_weight is the sum of xhat, which is 0.
    x = to_layout(torch.randn(16, 16, 32, 32, device=device), layout)
    weight, bias = torch.full((16,), 0.1, device=device).requires_grad_(), torch.full((16,), 6.0, device=device)
    residual = torch.zeros_like(x) if has_residual else None
    y = batch_norm_act(x, None, None, weight, bias, residual=residual, training=True, act=act)
    (grad_weight,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    count = x.numel() // 16
    # Roundings to either side add up to about a third of this limit, roundings to one side to two or three times it.
    assert grad_weight.abs().max() <= 16 * 2.0**-24 * count**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@BARS
def test_saved_mean_carries_more_bits_than_the_input(case: Case, dtype: torch.dtype, device: str) -> None:
    # At 1e5 the spacing of float32 is 2^-7: a mean rounded to float32 is off by up to 4e-3 standard deviations.
    x = to_layout((torch.randn(case.shape, dtype=torch.float64) + 1e5).to(device, dtype), case.layout)
    fwd = reference.forward(x)
    _, stats, _ = torch.ops.bnext.batch_norm_train(x, None, None, None, None, None, 0.1, 1e-5)
    stat = tolerances.statistics(fwd.count, dtype)
    # The mean itself is a double: 1e5 has a spacing of 2^-36.
    assert_within(stats[0], fwd.mean, stat * fwd.var.sqrt() + tolerances.ulp(fwd.mean.abs(), torch.float64), "mean")
    assert_within(stats[1], fwd.invstd, stat * fwd.invstd, "invstd")


@pytest.mark.not_emulated
@pytest.mark.parametrize("offset", [1e2, -1e5], ids="offset={:g}".format)
@pytest.mark.parametrize("first", ["zero", "one value", "noise"])
@pytest.mark.parametrize("case", [case for case in BAR_CASES if case.layout != "offset"], ids=name)
def test_first_image_unlike_the_rest(case: Case, first: str, offset: float, device: str) -> None:
    # A shift taken from the first image alone lies far from the mean of the batch.
    x = torch.randn(case.shape, device=device)
    x[1:] += offset
    if first != "noise":
        x[0] = 0.0 if first == "zero" else 0.3
    x = to_layout(x, case.layout)
    assert_bars(x, make_grad(case.shape, device=device))
    fwd = reference.forward(x)
    _, stats, _ = torch.ops.bnext.batch_norm_train(x, None, None, None, None, None, 0.1, 1e-5)
    assert relative_error(stats[1].cpu() ** -2, fwd.var + 1e-5) <= 1e-6


@BARS
def test_last_image_unlike_the_rest(case: Case, device: str) -> None:
    # The samples that the shift is taken from may miss the last image.
    x = torch.randn(case.shape, device=device)
    x[-1] += 1e4
    assert_bars(to_layout(x, case.layout), make_grad(case.shape, device=device))


@pytest.mark.parametrize("magnitude", [1e3, 1e6, 1e15], ids="{:g}".format)
@BARS
def test_outliers_in_pairs(case: Case, magnitude: float, device: str) -> None:
    # Two outliers of opposite signs leave the mean where it is, and make up the variance: every other value must
    # survive beside them.
    x = torch.randn(case.shape, device=device)
    x[0, :], x[-1, :] = x[0, :].clamp(-1, 1), x[-1, :].clamp(-1, 1)
    picked = (0, slice(None), *[0] * (x.ndim - 2))
    x[picked] = magnitude
    x[(-1, *picked[1:])] = -magnitude
    x = to_layout(x, case.layout)
    g = make_grad(case.shape, device=device)
    ones, zeros = torch.ones(x.shape[1], device=device), torch.zeros(x.shape[1], device=device)
    check_call(Inputs(x, g, Parameters(None, None, zeros, ones)), training=True)


CONSTANTS = (0.0, -0.0, 1.0, 0.1, -3.7, 1e4 + 1 / 3, 65504.0, 1e30, 3e38)


@EACH_DTYPE
@pytest.mark.parametrize("case", in_emulation(FEW_CASES, DENSE_CASES), ids=name)
def test_constant_channel_is_exactly_bias(case: Case, dtype: torch.dtype, device: str) -> None:
    # 1 + 1e-8 == 1 in float32, and 1/sqrt(1e-8) would make an output of any size out of a variance that is not exactly
    # zero. Where all xhat are zero, so is grad_weight; and equal gradients change nothing.
    p = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    weight = p.weight.requires_grad_()
    for value in (v for v in CONSTANTS if v <= torch.finfo(dtype).max):
        x = torch.full(case.shape, value, dtype=dtype, device=device)
        x = to_layout(x, case.layout).detach().requires_grad_()
        y = batch_norm(x, None, None, weight, p.bias, training=True, eps=1e-8)
        assert torch.equal(y, reference.along_channels(p.bias.to(dtype), x.ndim).expand(case.shape)), value
        for grad in torch.autograd.grad(y, (x, weight), torch.ones_like(y)):
            assert torch.equal(grad, torch.zeros_like(grad)), value


@pytest.mark.not_emulated
@pairs(case=FEW_CASES, act=FEW_ACTS, dtype=(torch.float32, torch.float64))
def test_constant_channel_is_exactly_act_of_bias(case: Case, act: Act, dtype: torch.dtype, device: str) -> None:
    # The channel holds one value, since it is computed from the bias alone. Its bits may depend on the constant: where
    # sums do not fit float32, the activation too is computed in float64.
    p = make_parameters(case.shape[1], dtype, device)
    ndim = len(case.shape)
    bias = reference.along_channels(reference.widen(p.bias), ndim).expand(case.shape)
    expected = reference.activate(bias, act)
    limit = 4 * tolerances.unit(dtype) * (expected.abs() + bias.abs()) + tolerances.half_ulp(expected, dtype)
    for value in CONSTANTS:
        x = to_layout(torch.full(case.shape, value, dtype=dtype, device=device), case.layout)
        y = batch_norm_act(x, None, None, p.weight, p.bias, training=True, act=act)
        assert_within(y, expected, 0.0 if act in ("identity", "relu") else limit, f"output of {value}")
        first = y[(slice(1), slice(None), *[slice(1)] * (ndim - 2))]
        assert torch.equal(y, first.expand_as(y)), value


SCALES = (1e-30, 1e-18, 1e18, 1e30)


def check_at_scale(case: Case, scale: float, act: Act, has_residual: bool, device: str) -> None:
    # The squares of the values overflow float32, or vanish in it. eps is too small to hide a small variance.
    x = to_layout((torch.randn(case.shape, dtype=torch.float64) * scale).to(device, torch.float32), case.layout)
    inputs = make_inputs(*case, device=device, has_residual=has_residual)
    params = inputs.params._replace(running_var=torch.ones_like(inputs.params.running_var))
    eps = min(1e-5, scale**2 * 1e-3)
    check_call(inputs._replace(input=x, params=params), training=True, momentum=1.0, eps=eps, act=act)


@pytest.mark.parametrize("case", in_emulation(EMULATED_CASES, [*FEW_CASES, *BAR_CASES]), ids=name)
@pytest.mark.parametrize("scale", SCALES, ids="{:g}".format)
def test_every_finite_float32(scale: float, case: Case, device: str) -> None:
    check_at_scale(case, scale, None, False, device)


@pytest.mark.not_emulated
@pairs(case=FEW_CASES, scale=SCALES, act=ACTS, has_residual=FLAGS)
def test_every_finite_float32_before_an_activation(
    case: Case, scale: float, act: Act, has_residual: bool, device: str
) -> None:
    check_at_scale(case, scale, act, has_residual, device)


@pytest.mark.not_emulated
@EVERY_ACT
@pytest.mark.parametrize("size", [1e4, 1e15, 1e30], ids="{:g}".format)
def test_pre_activations_of_any_size(size: float, act: Act, device: str) -> None:
    # Beyond the range of exp and erf the activation is 0 or z, its derivative 0 or 1: no inf times 0, no NaN.
    signs = make_grad((6, 5, 7, 3), device=device).sign()
    residual = torch.where(
        make_grad((6, 5, 7, 3), device=device) > 1, make_residual((6, 5, 7, 3), device=device), signs * size
    )
    x, g = make_input((6, 5, 7, 3), device=device), make_grad((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    for training in (True, False):
        check_call(Inputs(x, g, params, residual), training=training, act=act)


@rows(
    ("case", "dtype", "training", "act"),
    [
        *pairwise([*FEW_CASES, *BAR_CASES], LOW_PRECISION, FLAGS, (None,)),
        *pairwise(FEW_CASES, LOW_PRECISION, FLAGS, FEW_ACTS),
    ],
)
def test_half_precision_output_is_correctly_rounded(
    case: Case, dtype: torch.dtype, training: bool, act: Act, device: str
) -> None:
    x, _, p, residual = make_inputs(*case, dtype, device, has_residual=act is not None)
    y = call(x, p.clone(), *p[:2], training, residual=residual, act=act).cpu()
    # Rounding is monotone: whatever float32 result lies within its error of the exact one, it rounds to a number
    # between these two. They are one and the same, except near a tie or where float32 is the coarser (y near 0). An
    # activation is monotone between z's two bounds but for a turning point, which is covered by the slack of z.
    fwd = expected_forward(x, p, training, 1e-5, residual, act)
    options = {"training": training, "has_residual": act is not None, "act": act}
    error = tolerances.output(fwd, *p[:2], torch.float32, **options)
    error += tolerances.coarseness(act, dtype) * fwd.output.abs()
    low, high = (fwd.output - error).to(dtype), (fwd.output + error).to(dtype)
    assert ((low <= y) & (y <= high)).all()
    if act is None:
        # A tie lies within the error in as large a share of the values as the error has of the spacing; twice that
        # for its two sides, and 1% for chance.
        share = (2 * error / tolerances.ulp(fwd.output, dtype)).clamp(max=1).mean().item()
        assert (y != fwd.output.to(dtype)).double().mean().item() <= 2 * share + 0.01
