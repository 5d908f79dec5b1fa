"""The fused op at both ends of the range, far from zero, and with NaN and inf: every activation, both passes."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    RECTIFIERS,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
    same_bits,
    to_layout,
)
from checks import check_backward, check_forward
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm_act

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)

BAR_CASES = [
    Case((4096, 3), "contiguous"),
    Case((16, 5, 16, 16), "contiguous"),
    Case((16, 5, 16, 16), "channels_last"),
    Case((16, 5, 16, 16), "sliced"),
]


def train_and_differentiate(x: Tensor, residual: Tensor | None, g: Tensor, act: Act) -> list[Tensor]:
    """Output and gradients of (input, residual) in training mode without running statistics."""
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    y = batch_norm_act(
        leaves[0], None, None, residual=leaves[1] if residual is not None else None, training=True, act=act
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@RESIDUAL
@FEW
@pytest.mark.parametrize("mean", [0.0, 1e2, -1e5], ids="mean={:g}".format)
@pytest.mark.parametrize("case", BAR_CASES, ids=name)
def test_offset_does_not_cost_accuracy(case: Case, mean: float, act: Act, has_residual: bool, device: str) -> None:
    # The contract's bar times the steepest slope of any activation, 1.5; there is no bar at a kink's two sides.
    x = to_layout(torch.randn(case.shape, device=device) + mean, case.layout)
    residual = make_residual(*case, device=device) if has_residual else None
    g = make_grad(case.shape, device=device)
    y = train_and_differentiate(x, residual, g, act)[0]
    fwd = reference.forward(x, residual=residual, act=act)
    assert_within(y, fwd.output, 1.5 * 2e-6 * (fwd.z.abs() / 4).clamp(min=1), "output")
    params = make_parameters(case.shape[1], device=device)
    check_forward(x, params, training=True, residual=residual, act=act)
    check_backward(x, g, params, training=True, residual=residual, act=act)


@RESIDUAL
@EVERY_ACT
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30], ids="{:g}".format)
def test_every_finite_float32(scale: float, act: Act, has_residual: bool, device: str) -> None:
    # Squares of these overflow float32, or vanish in it. eps is small enough not to hide the small ones.
    eps = min(1e-5, scale**2 * 1e-3)
    for case in FEW_CASES:
        values = torch.randn(case.shape, dtype=torch.float64) * scale
        x = to_layout(values.to(device, torch.float32), case.layout)
        residual = make_residual(*case, device=device) if has_residual else None
        g = make_grad(case.shape, device=device)
        p = make_parameters(case.shape[1], device=device)
        leaf = x.detach().requires_grad_()
        y = batch_norm_act(leaf, None, None, p.weight, p.bias, residual, True, 0.1, eps, act)
        (grad,) = torch.autograd.grad(y, leaf, g)

        fwd = reference.forward(x, p.weight, p.bias, eps=eps, residual=residual, act=act)
        options = {"training": True, "has_residual": has_residual, "act": act}
        assert_within(y, fwd.output, tolerances.output(fwd, p.weight, p.bias, x.dtype, **options), "output")
        expected = reference.backward(g, fwd, p.weight, training=True, act=act)
        slack = tolerances.slack(g, fwd, p.weight, p.bias, x.dtype, **options)
        limit = tolerances.grad_input(expected.residual, fwd, p.weight, x.dtype, training=True, slack=slack)
        assert expected.input.abs().max() < torch.finfo(torch.float32).max
        assert_within(grad, expected.input, limit, "grad_input")


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
        check_forward(x, params, training=training, residual=residual, act=act)
        check_backward(x, g, params, training=training, residual=residual, act=act)


CONSTANTS = (0.0, -0.0, 0.1, -3.7, 65504.0, 1e30, 3e38)


@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_constant_channel_is_exactly_act_of_bias(case: Case, dtype: torch.dtype, act: Act, device: str) -> None:
    # One value throughout the channel, since it is computed from the bias alone; and that of act, within its own few
    # roundings. Not the same bits for every constant: sums beyond float32 are taken again in float64, and so is act.
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


@FEW
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_constant_channel_passes_the_residual(case: Case, act: Act, device: str) -> None:
    # With weight * 0 and no bias z is the residual, to the bit.
    x = torch.full(case.shape, 0.1, device=device)
    residual = make_residual(*case, device=device)
    y = batch_norm_act(to_layout(x, case.layout), None, None, residual=residual, training=True, act=act)
    z = reference.widen(residual)
    expected = reference.activate(z, act)
    limit = 4 * tolerances.unit(x.dtype) * (expected.abs() + z.abs())
    assert_within(y, expected, 0.0 if act in ("identity", "relu") else limit, "output")


@RESIDUAL
@FEW
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_poison_only_their_own_channel(poison: float, act: Act, has_residual: bool, device: str) -> None:
    for case in FEW_CASES:
        for dtype in DTYPES:
            x, g = make_input(*case, dtype, device), make_grad(case.shape, dtype=dtype, device=device)
            residual = make_residual(*case, dtype, device) if has_residual else None
            bad = x.clone(memory_format=torch.preserve_format)
            bad[-1, 1, ...] = poison
            healthy = [c for c in range(case.shape[1]) if c != 1]
            clean, poisoned = (train_and_differentiate(t, residual, g, act) for t in (x, bad))
            for a, b in zip(clean, poisoned, strict=True):
                assert same_bits(a[:, healthy], b[:, healthy])
            assert poisoned[0][:, 1].isnan().all()  # the mean, or the variance, of that channel is NaN
            assert poisoned[1][:, 1].isnan().all()
            mean, var = (torch.zeros(case.shape[1], device=device, dtype=parameter_dtype(dtype)) for _ in range(2))
            batch_norm_act(bad, mean, var, residual=residual, training=True, act=act)
            assert mean[healthy].isfinite().all()
            assert var[healthy].isfinite().all()
            assert not mean[1].isfinite()
            assert not var[1].isfinite()


@MODES
@FEW
@pytest.mark.parametrize("where", ["residual", "grad_output"])
def test_nan_beside_the_input_stays_in_its_channel(where: str, act: Act, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x, residual, g = (make(case.shape, device=device) for make in (make_input, make_residual, make_grad))
        p = make_parameters(case.shape[1], device=device)
        bad = (residual if where == "residual" else g).clone()
        bad[0, 1] = torch.nan

        def run(residual: Tensor, g: Tensor, x: Tensor = x, p: object = p) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            stats, leaves = p.clone(), [t.detach().requires_grad_() for t in (x, residual, p.weight, p.bias)]
            y = batch_norm_act(
                leaves[0], stats.running_mean, stats.running_var, *leaves[2:], leaves[1], training, act=act
            )
            return y.detach(), list(torch.autograd.grad(y, leaves, g)), [stats.running_mean, stats.running_var]

        clean = run(residual, g)
        poisoned = run(bad, g) if where == "residual" else run(residual, bad)
        healthy = [c for c in range(case.shape[1]) if c != 1]
        assert all(map(same_bits, clean[2], poisoned[2])), "the residual is none of the statistics' business"
        assert same_bits(clean[0][:, healthy], poisoned[0][:, healthy])
        for a, b in zip(clean[1], poisoned[1], strict=True):
            assert same_bits(a[:, healthy] if a.ndim > 1 else a[healthy], b[:, healthy] if b.ndim > 1 else b[healthy])
        if where == "residual":
            assert torch.equal(poisoned[0].isnan(), bad.isnan())  # of the output, those elements and no others


@FEW
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_nan_in_eval_mode_stays_where_it_is(case: Case, act: Act, device: str) -> None:
    x, residual = make_input(*case, device=device), make_residual(case.shape, device=device)
    p = make_parameters(case.shape[1], device=device)
    bad = x.clone(memory_format=torch.preserve_format)
    bad[-1, 1, ...] = torch.nan
    y, z = (batch_norm_act(t, p.running_mean, p.running_var, p.weight, p.bias, residual, act=act) for t in (x, bad))
    hit = bad.isnan()
    assert z[hit].isnan().all()
    assert same_bits(y[~hit], z[~hit])


@EVERY_ACT
@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")], ids=str)
def test_infinity_in_eval_mode(infinity: float, act: Act, device: str) -> None:
    # Of a finite slope: relu(-inf) is 0 and relu(inf) is inf; where torch's own gives NaN for -inf (silu, hardswish:
    # inf*0), 0 is as good. Others are as they were.
    x = make_input((6, 5, 7, 3), device=device)
    bad = x.clone()
    bad[2, 1, 3] = infinity
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    y, z = (batch_norm_act(t, mean, var, act=act) for t in (x, bad))
    hit = bad.isinf()
    assert same_bits(y[~hit], z[~hit])
    if reference.named(act)[0] in ("identity", "elu", *RECTIFIERS):
        following, *slope = act if isinstance(act, tuple) else (act,)
        expected = bad if act == "identity" else getattr(torch.nn.functional, following)(bad, *slope)
        assert torch.equal(z[hit], expected[hit])
    elif infinity > 0:
        assert (z[hit].isinf() | z[hit].isnan()).all()  # torch's own gelu gives NaN
    else:
        assert (z[hit].isnan() | (z[hit] == 0)).all()


@RESIDUAL
def test_gradient_of_relu_at_nan_is_torchs(has_residual: bool, device: str) -> None:
    # relu(NaN) is NaN, and the gradient passes: torch drops it where z <= 0 and only there.
    for case in FEW_CASES:
        x, g = make_input(*case, device=device), make_grad(case.shape, device=device)
        x = x.clone(memory_format=torch.preserve_format)
        x[-1, 1, ...] = torch.nan
        p = make_parameters(case.shape[1], device=device)
        residual = make_residual(*case, device=device).requires_grad_() if has_residual else None
        bias = p.bias.clone().requires_grad_()
        leaves = [bias] if residual is None else [bias, residual]
        y = batch_norm_act(x, p.running_mean, p.running_var, p.weight, bias, residual)
        plain = batch_norm_act(x, p.running_mean, p.running_var, p.weight, bias, act=None)
        expected = torch.nn.functional.relu(plain if residual is None else plain + residual)
        assert same_bits(y.isnan(), expected.isnan())
        ours, theirs = (torch.autograd.grad(t, leaves, g) for t in (y, expected))
        reaching = torch.where(expected.detach() == 0, 0, g)  # torch's sum errs by as much as ours may
        limit = tolerances.grad_bias(reaching, x.dtype, x.dtype)
        assert_within(ours[0], reference.widen(theirs[0]), 2 * limit, "grad_bias")
        assert all(map(same_bits, ours[1:], theirs[1:]))


@RESIDUAL
def test_gradient_of_relu6_passes_at_nan(has_residual: bool, device: str) -> None:
    # torch passes it or not, as its vectors end; ours do as relu does, whether a mask says so or the pre-activation.
    x = torch.tensor([torch.nan, 6.0, 3.0, 7.0, -1.0, 0.0], device=device).repeat(7, 1).requires_grad_()
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    args = (torch.zeros_like(x), zero, one, zero, None, x) if has_residual else (x, zero, one)
    y = batch_norm_act(*args, act="relu6", eps=0.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], device=device).expand(7, 6))
