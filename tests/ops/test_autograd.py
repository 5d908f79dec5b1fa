"""Autograd: first, second and third derivatives, in reverse and forward mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    FEW_ACTS,
    FEW_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    pairwise,
    same_bits,
    to_layout,
)
from checks import call, make_inputs
from marks import FLAGS, MODES, PLAIN_OR_ACT, each, pairs, rows
from reference import Act
from tolerances import assert_within
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import bnext
from bnext.functional import batch_norm_act

DENSE = [
    Case((4, 3), "contiguous"),
    Case((2, 3, 3), "contiguous"),
    Case((2, 3, 2, 2), "contiguous"),
    Case((2, 3, 2, 2), "channels_last"),
    Case((2, 2, 1, 2, 2), "contiguous"),
    Case((2, 2, 1, 2, 2), "channels_last_3d"),
]
STRIDED = [
    Case((4, 3), "transposed"),
    Case((2, 3, 3), "expanded_channels"),
    Case((2, 3, 2, 2), "channels_last_offset"),
    Case((2, 3, 2, 2), "sliced"),
    Case((3, 2, 1, 2), "expanded"),
]
NAMES = ("input", "weight", "bias", "residual")
DISTANCE = 1e-2  # from the kinks: ten thousand steps of the numerical derivative


class Needs(tuple[bool, ...]):
    """A flag for each of input, weight, bias and residual."""

    def __str__(self) -> str:
        return "+".join(itertools.compress(NAMES, self))


SUBSETS = [Needs(s) for s in itertools.product(FLAGS, repeat=4) if any(s)]


class Problem:
    """Inputs in float64 whose pre-activations are not near a kink, and the call as a function of those that it has."""

    def __init__(self, case: Case, act: Act, training: bool, has_residual: bool = True, missing: str = "") -> None:
        self.layout, self.act, self.training = case.layout, act, training
        while True:
            x, _, self.stats, residual = make_inputs(case.shape, dtype=torch.float64, has_residual=has_residual)
            if missing == "bias" and act == ("elu", 0.5):
                # Without a bias a weight of zero puts a channel on the kink, where the derivatives depend on torch's
                # version: 2.14 and earlier ones differ.
                weight = self.stats.weight
                self.stats = self.stats._replace(weight=weight.where(weight != 0, 0.5))
            weight, bias = (None if what in missing else getattr(self.stats, what) for what in ("weight", "bias"))
            self.slots = (x, weight, bias, residual)
            self.values = tuple(value for value in self.slots if value is not None)
            x, weight, bias, added = self.arguments(self.values)
            mean, var = (None, None) if training else self.stats[2:]
            z = reference.forward(x, weight, bias, running_mean=mean, running_var=var, residual=added).z
            # Without a bias a channel may lie on a kink, which is no obstacle to the formula.
            if missing or all(((z - kink).abs() > DISTANCE).all() for kink in tolerances.shape(act).kinks):
                break

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        rest = iter(tensors)
        x, weight, bias, residual = (None if slot is None else next(rest) for slot in self.slots)
        x, residual = (None if t is None else to_layout(t, self.layout) for t in (x, residual))
        return x, weight, bias, residual

    def leaves(self, needs: Sequence[bool] = (True,) * 4) -> tuple[Tensor, ...]:
        return tuple(v.detach().requires_grad_(n) for v, n in zip(self.values, needs, strict=False))

    def run(self, *tensors: Tensor) -> Tensor:
        """Each call has fresh running statistics."""
        x, weight, bias, added = self.arguments(tensors)
        return call(x, self.stats.clone(), weight, bias, self.training, residual=added, act=self.act)

    def composite(self, *tensors: Tensor) -> Tensor:
        x, weight, bias, added = self.arguments(tensors)
        return reference.composite(x, *self.stats[2:], weight, bias, self.training, residual=added, act=self.act)

    def check(self, needs: Sequence[bool] = (True,) * 4) -> None:
        """First and second derivatives of each kind, against differences along random directions: each element is
        compared in test_derivatives_equal_those_of_the_formula."""
        options = {"check_batched_grad": True, "fast_mode": True}
        leaves = self.leaves(needs)
        assert gradcheck(self.run, leaves, check_forward_ad=True, check_batched_forward_grad=True, **options)
        assert gradgradcheck(self.run, leaves, check_fwd_over_rev=True, **options)


@rows(
    ("case", "act", "training", "has_residual"),
    [*pairwise(DENSE, (None, *ACTS), FLAGS, FLAGS), *pairwise(STRIDED, (None, "relu", "gelu"), FLAGS, FLAGS)],
)
def test_gradcheck_in_every_layout(case: Case, act: Act, training: bool, has_residual: bool) -> None:
    Problem(case, act, training, has_residual).check()


@pairs(needs=SUBSETS, act=(None, "identity", "relu", "silu"), shape=((3, 2, 2), (2, 2, 2, 1)), training=FLAGS)
def test_every_subset_of_needs_input_grad(needs: Needs, act: Act, shape: tuple[int, ...], training: bool) -> None:
    # One activation for each way to know act'(z): it is 1, it is a bit of a mask, or z is computed again.
    Problem(Case(shape, "contiguous"), act, training, has_residual=act is not None or needs[3]).check(needs)


@MODES
@each(mask=[Needs(mask) for mask in itertools.product(FLAGS, repeat=3) if any(mask)])
def test_derivatives_of_the_backward_op(mask: tuple[bool, ...], training: bool) -> None:
    # Graphs captured by torch.compile call this operator. In training save_stats is a function of the input, and the
    # derivative goes through it, as in autograd.
    x, weight, _ = Problem(Case((2, 3, 2, 2), "contiguous"), None, training, has_residual=False).leaves()
    g = make_grad((2, 3, 2, 2), dtype=torch.float64).requires_grad_()
    p = make_parameters(3, torch.float64)

    def run(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        if training:
            _, stats, _ = torch.ops.bnext.batch_norm_train(x.detach(), None, None, None, None, None, 0.1, 1e-5)
        else:
            _, stats, _ = torch.ops.bnext.batch_norm_eval(x.detach(), None, None, p.running_mean, p.running_var, 1e-5)
        grads = torch.ops.bnext.batch_norm_backward(g, x, weight, stats, training, 1e-5, [*mask, False])
        return tuple(t for t, asked in zip(grads, [*mask, False], strict=True) if asked)

    # grad_bias is sum(g): it depends on neither x nor weight.
    assert gradcheck(run, (g, x, weight), check_forward_ad=True, check_undefined_grad=False)


def derivatives(run: Callable[..., Tensor], inputs: Sequence[Tensor], order: int) -> list[Tensor]:
    """All derivatives, up to `order`, of sum(sin(run)) along fixed random directions, one after the other."""
    results: list[Tensor] = []
    scalar = run(*inputs).sin().sum()
    for step in range(order):
        grads = torch.autograd.grad(scalar, inputs, create_graph=step + 1 < order)
        results.extend(g.detach() for g in grads)
        generator = torch.Generator().manual_seed(step)
        scalar = sum((g * torch.randn(g.shape, dtype=g.dtype, generator=generator)).sum() for g in grads)
    return results


@pairs(
    case=FEW_CASES,
    act=(None, *ACTS),
    training=FLAGS,
    has_residual=FLAGS,
    missing=("", "bias", "weight", "weight+bias"),
)
def test_derivatives_equal_those_of_the_formula(
    case: Case, act: Act, training: bool, has_residual: bool, missing: str
) -> None:
    problem = Problem(case, act, training, has_residual, missing=missing)
    inputs = problem.leaves()
    ours, theirs = (derivatives(run, inputs, 3) for run in (problem.run, problem.composite))
    for a, b in zip(ours, theirs, strict=True):
        # Each derivative sums a few hundred terms, whose size may exceed that of the result by 1e3 at most here:
        # 2^-53 * 1e2 * 1e3 = 1e-11 of the largest element.
        assert_within(a, b, 1e-11 * b.abs().max(), "derivative")


@pairs(moving=SUBSETS, act=PLAIN_OR_ACT, layout=("contiguous", "channels_last", "sliced"), training=FLAGS)
def test_forward_mode(moving: Needs, act: Act, layout: str, training: bool) -> None:
    problem = Problem(Case((3, 4, 3, 2), layout), act, training, has_residual=act is not None or moving[3])
    primals = [t.detach() for t in problem.values]
    tangents = [torch.randn_like(t) for t in primals]

    def jvp(run: Callable[..., Tensor], grad_enabled: bool) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            chosen = zip(primals, tangents, moving, strict=False)
            inputs = [forward_ad.make_dual(p, t) if m else p for p, t, m in chosen]
            tangent = forward_ad.unpack_dual(run(*inputs)).tangent
            assert tangent is not None
            return tangent

    expected = jvp(problem.composite, True)
    for grad_enabled in (True, False):
        actual = jvp(problem.run, grad_enabled)
        # A tangent is a sum of under a hundred terms of about its own size.
        assert_within(actual, expected, 2.0**-53 * 1e3 * (1 + expected.abs().max()), "tangent")


@rows(
    ("along", "act", "dtype", "training"),
    [
        # The derivative of the plain op along the input is self-adjoint, and that along the residual is act'(z) of each
        # element: the tangent is what backward makes of the same vector.
        *pairwise(("input",), (None,), (torch.float32, torch.bfloat16), FLAGS),
        *pairwise(("residual",), FEW_ACTS, (torch.float32, torch.bfloat16), FLAGS),
    ],
)
def test_forward_mode_keeps_the_dtype(along: str, act: Act, dtype: torch.dtype, training: bool) -> None:
    x, t, p, residual = make_inputs((6, 5, 7, 3), dtype=dtype, has_residual=along == "residual")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x if along == "input" else residual, t)
        args = {"input": x, "residual": residual, along: dual}
        y = call(args["input"], p.clone(), *p[:2], training, residual=args["residual"], act=act)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent.dtype == dtype
    mean, var = (None, None) if training else p[2:]
    fwd = reference.forward(x, *p[:2], running_mean=mean, running_var=var, residual=residual, act=act)
    expected = getattr(reference.backward(t, fwd, p.weight, training=training, act=act), along)
    if along == "input":
        limit = tolerances.grad_input(t, fwd, p.weight, dtype, training=training)
    else:
        limit = tolerances.slack(t, fwd, *p[:2], dtype, training=training, has_residual=True, act=act)
    # Several operators of torch compute the tangent, and each may round to its dtype.
    assert_within(tangent, expected, 4 * limit + 4 * tolerances.ulp(expected.abs().max(), dtype), "tangent")


@each(act=PLAIN_OR_ACT)
def test_same_module_twice_before_backward(act: Act, device: str) -> None:
    # The second call must not change what the first has saved: statistics, and a mask.
    module = bnext.BatchNormAct2d(5, act=act, device=device) if act else bnext.BatchNorm2d(5, device=device)
    layouts = ("contiguous", "channels_last")
    makers = (make_input, make_residual) if act else (make_input,)
    batches = [[make((3, 5, 5, 3), layout, device=device) for make in makers] for layout in layouts]
    grads = [make_grad((3, 5, 5, 3), device=device) for _ in batches]

    def gradients(calls: Sequence[int]) -> list[Tensor]:
        """The gradients of each call's input and residual. All outputs are computed before backward."""
        leaves = [[t.detach().requires_grad_() for t in batches[i]] for i in calls]
        outputs = [module(*inputs) for inputs in leaves]
        torch.autograd.backward(outputs, [grads[i] for i in calls])
        return [t.grad for inputs in leaves for t in inputs]

    together = gradients((0, 1))
    weight_grad, bias_grad = module.weight.grad.clone(), module.bias.grad.clone()
    module.zero_grad()
    apart = gradients((0,)) + gradients((1,))
    assert all(map(same_bits, together, apart))
    assert same_bits(module.weight.grad, weight_grad)
    assert same_bits(module.bias.grad, bias_grad)


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_backward_twice_gives_the_same_bits(act: Act, training: bool, has_residual: bool, device: str) -> None:
    x, g, p, residual = make_inputs((6, 5, 7, 3), device=device, has_residual=has_residual)
    inputs = [t.requires_grad_() for t in (x, p.weight, residual) if t is not None]
    y = call(x, p, p.weight, p.bias, training, residual=residual, act=act)
    first = torch.autograd.grad(y, inputs, g, retain_graph=True)
    second = torch.autograd.grad(y, inputs, g)
    assert all(map(same_bits, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, g)


@pairs(act=PLAIN_OR_ACT, training=FLAGS, changed=("input", "weight"))
def test_in_place_change_of_a_saved_tensor_raises(act: Act, training: bool, changed: str, device: str) -> None:
    x, _, p, residual = make_inputs((6, 5, 7, 3), device=device, has_residual=act is not None)
    y = call(x.requires_grad_(), p, p.weight.requires_grad_(), p.bias, training, residual=residual, act=act)
    with torch.no_grad():
        {"input": x, "weight": p.weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pairs(act=PLAIN_OR_ACT, training=FLAGS)
def test_later_updates_of_the_running_stats_do_not_reach_backward(act: Act, training: bool, device: str) -> None:
    # A training step may come between an evaluation and its backward: the graph has statistics of its own.
    x, g, p, residual = make_inputs((6, 5, 7, 3), device=device, has_residual=act is not None)

    def gradients(disturb: bool) -> tuple[Tensor, ...]:
        stats, leaves = p.clone(), [t.detach().requires_grad_() for t in (x, residual) if t is not None]
        y = call(leaves[0], stats, p.weight, p.bias, training, residual=leaves[1] if act else None, act=act)
        if disturb:
            batch_norm_act(g, *stats[2:], training=True)
        return torch.autograd.grad(y, leaves, g)

    assert all(map(same_bits, gradients(True), gradients(False)))


@MODES
def test_save_stats_carry_no_gradient(training: bool) -> None:
    x, weight, bias = Problem(Case((4, 3), "contiguous"), None, training, has_residual=False).leaves()
    p = make_parameters(3, torch.float64)
    if training:
        y, stats, _ = torch.ops.bnext.batch_norm_train(x, weight, bias, None, None, None, 0.1, 1e-5)
    else:
        y, stats, _ = torch.ops.bnext.batch_norm_eval(x, weight, bias, p.running_mean, p.running_var, 1e-5)
    assert y.requires_grad
    assert not stats.requires_grad
