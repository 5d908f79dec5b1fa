"""NaN and infinity: which results they reach, and that other channels keep their bits."""

from __future__ import annotations

import math

import pytest
import reference
import tolerances
import torch
from cases import DTYPES, FEW_CASES, RECTIFIERS, Case, Parameters, make_input, parameter_dtype, same_bits
from checks import call, make_inputs
from marks import EVERY_ACT, FLAGS, PLAIN_OR_ACT, RESIDUAL, pairs
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm_act

pytestmark = pytest.mark.kernels


def train_and_differentiate(x: Tensor, residual: Tensor | None, g: Tensor, act: Act) -> list[Tensor]:
    """Output and gradients of (input, residual) in training mode without running statistics."""
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    without = Parameters(None, None, None, None)
    y = call(leaves[0], without, None, None, True, residual=leaves[1] if residual is not None else None, act=act)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


@pairs(
    case=FEW_CASES,
    dtype=DTYPES,
    act=PLAIN_OR_ACT,
    poison=(torch.nan, torch.inf, -torch.inf),
    where=(0, -1),  # the other values may be shifted by the first ones
    has_residual=FLAGS,
)
def test_nan_and_inf_poison_only_their_own_channel(
    case: Case, dtype: torch.dtype, act: Act, poison: float, where: int, has_residual: bool, device: str
) -> None:
    x, g, _, residual = make_inputs(*case, dtype, device, has_residual)
    bad = x.clone(memory_format=torch.preserve_format)
    bad[where, 1, ...] = poison
    healthy = [c for c in range(case.shape[1]) if c != 1]
    clean, poisoned = (train_and_differentiate(t, residual, g, act) for t in (x, bad))
    for a, b in zip(clean, poisoned, strict=True):
        assert same_bits(a[:, healthy], b[:, healthy])
    assert poisoned[0][:, 1].isnan().all()
    assert poisoned[1][:, 1].isnan().all()
    mean, var = (torch.zeros(case.shape[1], device=device, dtype=parameter_dtype(dtype)) for _ in range(2))
    call(bad, Parameters(None, None, mean, var), None, None, True, residual=residual, act=act)
    assert mean[healthy].isfinite().all()
    assert var[healthy].isfinite().all()
    assert mean[1] == poison or (math.isnan(poison) and mean[1].isnan())  # as in torch
    assert var[1].isnan()


@pairs(case=FEW_CASES, act=PLAIN_OR_ACT, training=FLAGS, where=("grad_output", "residual"))
def test_nan_beside_the_input_stays_in_its_channel(
    case: Case, act: Act, training: bool, where: str, device: str
) -> None:
    x, g, p, residual = make_inputs(case.shape, device=device, has_residual=act is not None or where == "residual")
    bad = (residual if where == "residual" else g).clone()
    bad[:, 1] = torch.nan  # where one value alone is NaN, a rectifier may be closed

    def run(residual: Tensor | None, g: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        stats = p.clone()
        leaves = [t.detach().requires_grad_() for t in (x, p.weight, p.bias, residual) if t is not None]
        added = None if residual is None else leaves[3]
        y = call(leaves[0], stats, *leaves[1:3], training, residual=added, act=act)
        return y.detach(), list(torch.autograd.grad(y, leaves, g)), [stats.running_mean, stats.running_var]

    clean = run(residual, g)
    poisoned = run(bad, g) if where == "residual" else run(residual, bad)
    healthy = [c for c in range(case.shape[1]) if c != 1]
    assert all(map(same_bits, clean[2], poisoned[2])), f"the running statistics depend on {where}"
    assert same_bits(clean[0][:, healthy], poisoned[0][:, healthy])
    for a, b in zip(clean[1], poisoned[1], strict=True):
        assert same_bits(a[:, healthy] if a.ndim > 1 else a[healthy], b[:, healthy] if b.ndim > 1 else b[healthy])
    if where == "residual":
        assert torch.equal(poisoned[0].isnan(), bad.isnan())
    elif training:
        assert poisoned[1][0][:, 1].isnan().all()


@pairs(case=FEW_CASES, act=PLAIN_OR_ACT)
def test_nan_in_eval_mode_stays_where_it_is(case: Case, act: Act, device: str) -> None:
    x, _, p, residual = make_inputs(*case, device=device, has_residual=act is not None)
    bad = x.clone(memory_format=torch.preserve_format)
    bad[-1, 1, ...] = torch.nan
    y, z = (call(t, p, p.weight, p.bias, False, residual=residual, act=act) for t in (x, bad))
    hit = bad.isnan()
    assert z[hit].isnan().all()
    assert same_bits(y[~hit], z[~hit])


@pytest.mark.not_emulated
@EVERY_ACT
@pytest.mark.parametrize("infinity", [float("inf"), float("-inf")], ids=str)
def test_infinity_in_eval_mode(infinity: float, act: Act, device: str) -> None:
    # Identity, elu and rectifiers give what torch's give: relu(-inf) is 0, relu(inf) is inf. Other activations of torch
    # may give NaN (silu and hardswish of -inf: inf*0), and the limit is as good. Finite elements keep their bits.
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


@pytest.mark.not_emulated
@RESIDUAL
def test_gradient_of_relu_at_nan_is_torchs(has_residual: bool, device: str) -> None:
    # relu(NaN) is NaN, and the gradient passes: torch drops it where z <= 0 and only there.
    for case in FEW_CASES:
        x, g, p, residual = make_inputs(*case, device=device, has_residual=has_residual)
        x = x.clone(memory_format=torch.preserve_format)
        x[-1, 1, ...] = torch.nan
        leaves = [t.detach().requires_grad_() for t in (p.bias, residual) if t is not None]
        bias, residual = (*leaves, None)[:2]
        y = batch_norm_act(x, *p[2:], p.weight, bias, residual)
        plain = batch_norm_act(x, *p[2:], p.weight, bias, act=None)
        expected = torch.nn.functional.relu(plain if residual is None else plain + residual)
        assert same_bits(y.isnan(), expected.isnan())
        ours, theirs = (torch.autograd.grad(t, leaves, g) for t in (y, expected))
        reaching = torch.where(expected.detach() == 0, 0, g)  # torch's sum errs by as much as ours may
        limit = tolerances.grad_bias(reaching, x.dtype, x.dtype)
        assert_within(ours[0], reference.widen(theirs[0]), 2 * limit, "grad_bias")
        assert all(map(same_bits, ours[1:], theirs[1:]))


@pytest.mark.not_emulated
@RESIDUAL
def test_gradient_of_relu6_passes_at_nan(has_residual: bool, device: str) -> None:
    # In torch an element's place in a vector decides. Here the gradient passes as relu's does, with a mask and without.
    x = torch.tensor([torch.nan, 6.0, 3.0, 7.0, -1.0, 0.0], device=device).repeat(7, 1).requires_grad_()
    zero, one = torch.zeros(6, device=device), torch.ones(6, device=device)
    args = (torch.zeros_like(x), zero, one, zero, None, x) if has_residual else (x, zero, one)
    y = batch_norm_act(*args, act="relu6", eps=0.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0], device=device).expand(7, 6))
