"""Derivatives of every order of act(batch_norm(input) + residual), in reverse and forward mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import reference
import tolerances
import torch
from cases import (
    FEW_ACTS,
    FEW_CASES,
    Case,
    crossed,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    same_bits,
    to_layout,
)
from reference import Act
from test_autograd import derivatives
from tolerances import assert_within
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import bnext
from bnext.functional import batch_norm_act

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)

# Small, since the numerical derivative runs the forward pass twice for each element.
CHECKED_CASES = [
    Case((4, 3), "contiguous"),
    Case((2, 3, 3), "expanded_channels"),
    Case((2, 3, 2, 2), "channels_last"),
    Case((2, 3, 2, 2), "sliced"),
    Case((2, 2, 1, 2, 2), "channels_last_3d"),
]

NAMES = ("input", "weight", "bias", "residual")
SUBSETS = [s for s in itertools.product((True, False), repeat=4) if any(s)]
DISTANCE = 1e-2  # from the kinks: ten thousand steps of the numerical derivative


def subset_name(subset: Sequence[bool]) -> str:
    return "+".join(itertools.compress(NAMES, subset))


class Problem:
    """Inputs in float64, none of whose pre-activations lies near a kink, and the function of them alone."""

    def __init__(self, case: Case, act: Act, training: bool, has_residual: bool = True, own: bool = False) -> None:
        self.layout, self.act, self.training, self.own = case.layout, act, training, own
        channels = case.shape[1]
        while True:
            p = self.stats = make_parameters(channels, torch.float64)
            x, residual = make_input(case.shape, dtype=torch.float64), make_residual(case.shape, dtype=torch.float64)
            self.values = (x, p.weight, p.bias, *([residual] if has_residual else []))
            added = self.values[3] if has_residual else None
            frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
            laid_out = [None if t is None else to_layout(t, case.layout) for t in (x, added)]
            added = laid_out[0] if own else laid_out[1]
            z = reference.forward(laid_out[0], p.weight, p.bias, **frozen, residual=added).z
            if all(((z - kink).abs() > DISTANCE).all() for kink in tolerances.shape(act).kinks):
                break

    def leaves(self, needs: Sequence[bool] = (True,) * 4) -> tuple[Tensor, ...]:
        return tuple(v.detach().requires_grad_(n) for v, n in zip(self.values, needs, strict=False))

    def run(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Each call has fresh running statistics."""
        x, residual = (None if t is None else to_layout(t, self.layout) for t in (x, residual))
        mean, var = self.stats.running_mean.clone(), self.stats.running_var.clone()
        added = x if self.own else residual
        return batch_norm_act(x, mean, var, weight, bias, added, self.training, act=self.act)

    def composite(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        x, residual = (None if t is None else to_layout(t, self.layout) for t in (x, residual))
        mean, var = self.stats[2:]
        return reference.composite(x, mean, var, weight, bias, self.training, residual=residual, act=self.act)


@MODES
@RESIDUAL
@pytest.mark.parametrize(("case", "act"), crossed(CHECKED_CASES), ids=name)
def test_gradcheck_in_every_layout(case: Case, act: Act, has_residual: bool, training: bool) -> None:
    problem = Problem(case, act, training, has_residual)
    assert gradcheck(
        problem.run,
        problem.leaves(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@MODES
@RESIDUAL
@pytest.mark.parametrize(("case", "act"), crossed(CHECKED_CASES), ids=name)
def test_gradgradcheck_in_every_layout(case: Case, act: Act, has_residual: bool, training: bool) -> None:
    problem = Problem(case, act, training, has_residual)
    assert gradgradcheck(problem.run, problem.leaves(), check_fwd_over_rev=True, check_batched_grad=True)


@MODES
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("needs", SUBSETS, ids=subset_name)
def test_every_subset_of_needs_input_grad(needs: tuple[bool, ...], act: Act, training: bool) -> None:
    # Three ways to know act'(z): it is 1; it is a bit of a mask; z is computed again.
    problem = Problem(Case((3, 2, 2), "contiguous"), act, training)
    assert gradcheck(problem.run, problem.leaves(needs), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(problem.run, problem.leaves(needs), check_fwd_over_rev=True)


@MODES
@RESIDUAL
@FEW
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_derivatives_without_weight_or_bias(given: str, act: Act, has_residual: bool, training: bool) -> None:
    problem = Problem(Case((2, 3, 2, 2), "channels_last"), act, training, has_residual)
    x, weight, bias, *residual = problem.leaves()
    args = {"neither": (x, None, None), "weight": (x, weight, None), "bias": (x, None, bias)}[given]
    # The formula and not gradcheck: without the weight or the bias the pre-activations lie elsewhere, near a kink too.
    inputs = [t for t in (*args, *residual) if t is not None]

    def fill(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            return run(*(None if t is None else next(rest) for t in (*args, *residual)))

        return filled

    for a, b in zip(*(derivatives(fill(run), inputs, 2) for run in (problem.run, problem.composite)), strict=True):
        assert_within(a, b, 1e-11 * b.abs().max(), "derivative")  # as in test_autograd


@MODES
@RESIDUAL
@pytest.mark.parametrize(("case", "act"), crossed(FEW_CASES), ids=name)
def test_three_derivatives_equal_those_of_the_formula(case: Case, act: Act, has_residual: bool, training: bool) -> None:
    problem = Problem(case, act, training, has_residual)
    inputs = problem.leaves()
    ours, theirs = (derivatives(run, inputs, 3) for run in (problem.run, problem.composite))
    for a, b in zip(ours, theirs, strict=True):
        # Each derivative sums a few hundred terms, whose size may exceed that of the result by 1e3 at most here:
        # 2^-53 * 1e2 * 1e3 = 1e-11 of the largest element.
        assert_within(a, b, 1e-11 * b.abs().max(), "derivative")


@MODES
@FEW
def test_derivatives_where_the_input_is_its_own_residual(act: Act, training: bool) -> None:
    problem = Problem(Case((2, 3, 2, 2), "contiguous"), act, training, has_residual=False, own=True)
    assert gradcheck(problem.run, problem.leaves(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(problem.run, problem.leaves(), check_fwd_over_rev=True)


@MODES
@FEW
@pytest.mark.parametrize("moving", SUBSETS, ids=subset_name)
def test_forward_mode(moving: tuple[bool, ...], act: Act, training: bool) -> None:
    problem = Problem(Case((3, 4, 3, 2), "channels_last"), act, training)
    primals = [t.detach() for t in problem.values]
    tangents = [torch.randn_like(t) for t in primals]

    def jvp(run: Callable[..., Tensor], grad_enabled: bool) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            inputs = [forward_ad.make_dual(p, t) if m else p for p, t, m in zip(primals, tangents, moving, strict=True)]
            tangent = forward_ad.unpack_dual(run(*inputs)).tangent
            assert tangent is not None
            return tangent

    expected = jvp(problem.composite, True)
    for grad_enabled in (True, False):
        actual = jvp(problem.run, grad_enabled)
        # A tangent is a sum of under a hundred terms of about its own size.
        assert_within(actual, expected, 2.0**-53 * 1e3 * (1 + expected.abs().max()), "tangent")


@MODES
@FEW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_forward_mode_keeps_the_dtype(dtype: torch.dtype, act: Act, training: bool) -> None:
    x, t, residual = (make((6, 5, 7, 3), dtype=dtype) for make in (make_input, make_grad, make_residual))
    p = make_parameters(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(residual, t)
        y = batch_norm_act(x, p.running_mean.clone(), p.running_var.clone(), p.weight, p.bias, dual, training, act=act)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent.dtype == dtype
    # The derivative along the residual is act'(z), element by element: what backward makes of the same vector.
    frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
    fwd = reference.forward(x, p.weight, p.bias, **frozen, residual=residual, act=act)
    expected = reference.backward(t, fwd, p.weight, training=training, act=act).residual
    slack = tolerances.slack(t, fwd, p.weight, p.bias, dtype, training=training, has_residual=True, act=act)
    # Composed of torch's ops, the tangent may round more than once to its dtype.
    assert_within(tangent, expected, 4 * slack + 4 * tolerances.ulp(expected.abs().max(), dtype), "tangent")


@FEW
def test_same_module_twice_before_backward(act: Act, device: str) -> None:
    # What the first call keeps (statistics, a mask) must outlive the second.
    module = bnext.BatchNormAct2d(5, act=act, device=device)
    layouts = ("contiguous", "channels_last")
    batches = [
        [make((3, 5, 5, 3), layout, device=device) for make in (make_input, make_residual)] for layout in layouts
    ]
    grads = [make_grad((3, 5, 5, 3), device=device) for _ in batches]

    def gradients(calls: Sequence[int]) -> list[Tensor]:
        """Of each call's input and residual, all outputs being computed before the first backward."""
        leaves = [[t.detach().requires_grad_() for t in batches[i]] for i in calls]
        outputs = [module(*pair) for pair in leaves]
        torch.autograd.backward(outputs, [grads[i] for i in calls])
        return [t.grad for pair in leaves for t in pair]

    together = gradients((0, 1))
    weight_grad, bias_grad = module.weight.grad.clone(), module.bias.grad.clone()
    module.zero_grad()
    apart = gradients((0,)) + gradients((1,))
    assert all(map(same_bits, together, apart))
    assert same_bits(module.weight.grad, weight_grad)
    assert same_bits(module.bias.grad, bias_grad)


@MODES
@RESIDUAL
@FEW
def test_backward_twice_gives_the_same_bits(act: Act, has_residual: bool, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    residual = make_residual((6, 5, 7, 3), device=device).requires_grad_() if has_residual else None
    p = make_parameters(5, device=device)
    inputs = [t for t in (x, p.weight.requires_grad_(), residual) if t is not None]
    y = batch_norm_act(x, p.running_mean, p.running_var, p.weight, p.bias, residual, training, act=act)
    g = make_grad(tuple(y.shape), device=device)
    first = torch.autograd.grad(y, inputs, g, retain_graph=True)
    second = torch.autograd.grad(y, inputs, g)
    assert all(map(same_bits, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, g)


@MODES
@FEW
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_in_place_change_of_a_saved_tensor_raises(changed: str, act: Act, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    residual = make_residual((6, 5, 7, 3), device=device)
    p = make_parameters(5, device=device)
    weight = p.weight.requires_grad_()
    y = batch_norm_act(x, p.running_mean, p.running_var, weight, p.bias, residual, training, act=act)
    with torch.no_grad():
        {"input": x, "weight": weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@MODES
@FEW
def test_later_updates_of_the_running_stats_do_not_reach_backward(act: Act, training: bool, device: str) -> None:
    x, residual, g = (make((6, 5, 7, 3), device=device) for make in (make_input, make_residual, make_grad))
    p = make_parameters(5, device=device)

    def gradients(disturb: bool) -> tuple[Tensor, ...]:
        stats, leaves = p.clone(), [t.detach().requires_grad_() for t in (x, residual)]
        y = batch_norm_act(
            leaves[0], stats.running_mean, stats.running_var, p.weight, p.bias, leaves[1], training, act=act
        )
        if disturb:
            batch_norm_act(residual, stats.running_mean, stats.running_var, training=True)
        return torch.autograd.grad(y, leaves, g)

    assert all(map(same_bits, gradients(True), gradients(False)))


@FEW
def test_activation_checkpointing(act: Act, device: str) -> None:
    x, residual, g = (make((6, 5, 7, 3), device=device) for make in (make_input, make_residual, make_grad))

    def gradient(checkpointed: bool) -> list[Tensor]:
        module, leaves = (
            bnext.BatchNormAct2d(5, act=act, device=device),
            [t.clone().requires_grad_() for t in (x, residual)],
        )
        run = lambda *a: torch.utils.checkpoint.checkpoint(module, *a, use_reentrant=False)  # noqa: E731
        (run if checkpointed else module)(*leaves).backward(g)
        return [*(leaf.grad for leaf in leaves), module.weight.grad, module.bias.grad]

    assert all(map(same_bits, gradient(True), gradient(False)))
