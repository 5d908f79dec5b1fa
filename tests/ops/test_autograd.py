"""The contract's autograd row: first, second and third derivatives, forward mode, and what the graph holds on to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import reference
import tolerances
import torch
from cases import FEW_CASES, Case, Parameters, make_grad, make_input, make_parameters, name, same_bits, to_layout
from tolerances import assert_within
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import bnext
from bnext.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])

# Small, since the numerical derivative runs the forward pass twice for each element.
CHECKED_CASES = [
    Case((4, 3), "contiguous"),
    Case((4, 3), "transposed"),
    Case((2, 3, 3), "contiguous"),
    Case((2, 3, 3), "expanded_channels"),
    Case((2, 3, 2, 2), "contiguous"),
    Case((2, 3, 2, 2), "channels_last"),
    Case((2, 3, 2, 2), "channels_last_offset"),
    Case((2, 3, 2, 2), "sliced"),
    Case((3, 2, 1, 2), "expanded"),
    Case((2, 2, 1, 2, 2), "contiguous"),
    Case((2, 2, 1, 2, 2), "channels_last_3d"),
]

SUBSETS = [s for s in itertools.product((True, False), repeat=3) if any(s)]


def subset_name(subset: Sequence[bool]) -> str:
    return "+".join(n for n, wanted in zip(("input", "weight", "bias"), subset, strict=True) if wanted)


def leaves(shape: tuple[int, ...], needs: Sequence[bool] = (True, True, True)) -> tuple[Tensor, ...]:
    """Input, weight and bias in float64; those of `needs` ask for gradients."""
    p = make_parameters(shape[1], torch.float64)
    values = (make_input(shape, dtype=torch.float64), p.weight, p.bias)
    return tuple(v.detach().requires_grad_(n) for v, n in zip(values, needs, strict=True))


def as_function(layout: str, stats: Parameters, training: bool) -> Callable[..., Tensor]:
    """Batch norm of (input, weight, bias) alone: each call has fresh running statistics."""

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        mean, var = stats.running_mean.clone(), stats.running_var.clone()
        return batch_norm(to_layout(x, layout), mean, var, weight, bias, training)

    return run


@MODES
@pytest.mark.parametrize("case", CHECKED_CASES, ids=name)
def test_gradcheck_in_every_layout(case: Case, training: bool) -> None:
    run = as_function(case.layout, make_parameters(case.shape[1], torch.float64), training)
    assert gradcheck(
        run, leaves(case.shape), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@MODES
@pytest.mark.parametrize("case", CHECKED_CASES, ids=name)
def test_gradgradcheck_in_every_layout(case: Case, training: bool) -> None:
    run = as_function(case.layout, make_parameters(case.shape[1], torch.float64), training)
    assert gradgradcheck(run, leaves(case.shape), check_fwd_over_rev=True, check_batched_grad=True)


@MODES
@pytest.mark.parametrize("needs", SUBSETS, ids=subset_name)
@pytest.mark.parametrize("shape", [(3, 2, 2), (2, 2, 2, 1)], ids=str)
def test_every_subset_of_needs_input_grad(shape: tuple[int, ...], needs: tuple[bool, ...], training: bool) -> None:
    run = as_function("contiguous", make_parameters(shape[1], torch.float64), training)
    assert gradcheck(run, leaves(shape, needs), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, leaves(shape, needs), check_fwd_over_rev=True)


@MODES
@pytest.mark.parametrize("given", ["none", "weight", "bias"])
def test_derivatives_without_weight_or_bias(given: str, training: bool) -> None:
    shape = (2, 3, 2, 2)
    run = as_function("contiguous", make_parameters(3, torch.float64), training)
    x, weight, bias = leaves(shape)
    inputs = {"none": (x,), "weight": (x, weight), "bias": (x, None, bias)}[given]
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("mask", [m for m in itertools.product((True, False), repeat=3) if any(m)], ids=subset_name)
@MODES
def test_derivatives_of_the_backward_op(mask: tuple[bool, ...], training: bool) -> None:
    # The op itself, as a graph captured by torch.compile or torch.func calls it. In training mode save_stats is a
    # function of the input: as in autograd, the derivative goes through it.
    x, weight, _ = leaves((2, 3, 2, 2))
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


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_three_derivatives_equal_those_of_the_formula(case: Case, training: bool) -> None:
    inputs = leaves(case.shape)
    stats = make_parameters(case.shape[1], torch.float64)

    def composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.composite(x, stats.running_mean, stats.running_var, weight, bias, training)

    ours = derivatives(as_function(case.layout, stats, training), inputs, 3)
    theirs = derivatives(composite, inputs, 3)
    for a, b in zip(ours, theirs, strict=True):
        # Each derivative sums a few hundred terms, whose size may exceed that of the result by 1e3 at most here:
        # 2^-53 * 1e2 * 1e3 = 1e-11 of the largest element.
        assert_within(a, b, 1e-11 * b.abs().max(), "derivative")


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vmap"])
@MODES
def test_hessian_equals_that_of_the_formula(vectorize: bool, training: bool) -> None:
    x, weight, _ = leaves((3, 2, 2, 1))
    stats = make_parameters(2, torch.float64)
    run = as_function("channels_last", stats, training)

    def composite(x: Tensor, weight: Tensor) -> Tensor:
        return reference.composite(x, stats.running_mean, stats.running_var, weight, None, training)

    hessian = torch.autograd.functional.hessian
    ours = hessian(lambda *a: run(*a).sin().sum(), (x, weight), vectorize=vectorize)
    theirs = hessian(lambda *a: composite(*a).sin().sum(), (x, weight))
    for row, expected_row in zip(ours, theirs, strict=True):
        for a, b in zip(row, expected_row, strict=True):
            assert_within(a, b, 1e-11 * (1 + b.abs().max()), "hessian")  # as above


@MODES
@pytest.mark.parametrize("grad_enabled", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("moving", SUBSETS, ids=subset_name)
def test_forward_mode(moving: tuple[bool, ...], grad_enabled: bool, training: bool) -> None:
    shape = (3, 4, 3, 2)
    primals = [t.detach() for t in leaves(shape)]
    tangents = [torch.randn_like(t) for t in primals]
    stats = make_parameters(4, torch.float64)

    def composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.composite(x, stats.running_mean, stats.running_var, weight, bias, training)

    def jvp(run: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            inputs = [forward_ad.make_dual(p, t) if m else p for p, t, m in zip(primals, tangents, moving, strict=True)]
            tangent = forward_ad.unpack_dual(run(*inputs)).tangent
            assert tangent is not None
            return tangent

    expected = jvp(composite)
    for layout in ("contiguous", "channels_last", "sliced"):
        actual = jvp(as_function(layout, stats, training))
        # A tangent is a sum of under a hundred terms of about its own size.
        assert_within(actual, expected, 2.0**-53 * 1e3 * (1 + expected.abs().max()), f"tangent, {layout}")


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_forward_mode_keeps_the_dtype(dtype: torch.dtype, training: bool) -> None:
    x, t = make_input((6, 5, 7, 3), dtype=dtype), make_grad((6, 5, 7, 3), dtype=dtype)
    p = make_parameters(5)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        y = batch_norm(dual, p.running_mean.clone(), p.running_var.clone(), p.weight, p.bias, training)
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent.dtype == dtype
    # The derivative along x is self-adjoint: the tangent is what backward makes of the same vector.
    frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
    fwd = reference.forward(x, p.weight, p.bias, **frozen)
    expected = reference.backward(t, fwd, p.weight, training=training).input
    limit = tolerances.grad_input(t, fwd, p.weight, dtype, training=training)
    # Composed of torch's ops, the tangent may round more than once to its dtype.
    assert_within(tangent, expected, 4 * limit + 4 * tolerances.ulp(expected.abs().max(), dtype), "tangent")


def test_same_module_twice_before_backward(device: str) -> None:
    module = bnext.BatchNorm2d(5, device=device)
    batches = [make_input((3, 5, 5, 3), layout, device=device) for layout in ("contiguous", "channels_last")]
    grads = [make_grad((3, 5, 5, 3), device=device) for _ in batches]
    inputs = [x.detach().requires_grad_() for x in batches]
    outputs = [module(x) for x in inputs]
    torch.autograd.backward(outputs, grads)

    total_weight, total_bias = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    weight_limit, bias_limit = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for x, g in zip(inputs, grads, strict=True):
        fwd = reference.forward(x, module.weight)
        expected = reference.backward(g, fwd, module.weight, training=True)
        limit = tolerances.grad_input(g, fwd, module.weight, x.dtype, training=True)
        assert_within(x.grad, expected.input, limit, "grad_input")
        total_weight += expected.weight
        total_bias += expected.bias
        weight_limit += tolerances.grad_weight(g, fwd, x.dtype, x.dtype, training=True)
        bias_limit += tolerances.grad_bias(g, x.dtype, x.dtype)
    # The two contributions are rounded once more when they are added.
    assert_within(
        module.weight.grad, total_weight, weight_limit + tolerances.ulp(total_weight, torch.float32), "grad_weight"
    )
    assert_within(module.bias.grad, total_bias, bias_limit + tolerances.ulp(total_bias, torch.float32), "grad_bias")


@MODES
def test_backward_twice_gives_the_same_bits(training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    p = make_parameters(5, device=device)
    weight = p.weight.requires_grad_()
    y = batch_norm(x, p.running_mean, p.running_var, weight, p.bias, training)
    g = make_grad(tuple(y.shape), device=device)
    first = torch.autograd.grad(y, (x, weight), g, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), g)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, (x, weight), g)


@MODES
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_in_place_change_of_a_saved_tensor_raises(changed: str, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    p = make_parameters(5, device=device)
    weight = p.weight.requires_grad_()
    y = batch_norm(x, p.running_mean, p.running_var, weight, p.bias, training)
    with torch.no_grad():
        {"input": x, "weight": weight}[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_later_updates_of_the_running_stats_do_not_reach_backward(device: str) -> None:
    # A training step between an eval-mode forward and its backward: the statistics belong to the graph.
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    p = make_parameters(5, device=device)
    fwd = reference.forward(x, p.weight, p.bias, running_mean=p.running_mean, running_var=p.running_var)
    y = batch_norm(x, p.running_mean, p.running_var, p.weight, p.bias)
    batch_norm(make_input((6, 5, 7, 3), device=device), p.running_mean, p.running_var, training=True)
    g = make_grad((6, 5, 7, 3), device=device)
    (grad,) = torch.autograd.grad(y, x, g)
    expected = reference.backward(g, fwd, p.weight, training=False).input
    assert_within(grad, expected, tolerances.grad_input(g, fwd, p.weight, x.dtype, training=False), "grad_input")


@MODES
def test_output_may_be_changed_in_place(training: bool, device: str) -> None:
    # The output is not saved, so nn.ReLU(inplace=True) may follow.
    x = make_input((6, 5, 7, 3), device=device)
    p = make_parameters(5, device=device)

    def gradient(inplace: bool) -> Tensor:
        leaf = x.detach().requires_grad_()
        stats = p.clone()
        y = batch_norm(leaf, stats.running_mean, stats.running_var, p.weight, p.bias, training)
        return torch.autograd.grad(torch.nn.functional.relu(y, inplace=inplace).square().sum(), leaf)[0]

    assert same_bits(gradient(True), gradient(False))


def saved_bytes(run: Callable[[], Tensor]) -> int:
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("training", "needs", "holds_input"),
    [
        (True, (True, True, True), True),
        (True, (True, False, False), True),
        (True, (False, True, False), True),
        (True, (False, False, True), False),
        (False, (True, True, True), True),
        (False, (False, True, False), True),
        (False, (True, False, True), False),
        (False, (True, False, False), False),
        (False, (False, False, True), False),
    ],
    ids=lambda v: subset_name(v) if isinstance(v, tuple) else str(v),
)
def test_the_graph_holds_no_more_than_backward_needs(
    training: bool, needs: tuple[bool, ...], holds_input: bool, layout: str, dtype: torch.dtype, device: str
) -> None:
    x = make_input((6, 5, 7, 3), layout, dtype, device)
    p = make_parameters(5, device=device)
    x, weight, bias = (t.detach().requires_grad_(n) for t, n in zip((x, p.weight, p.bias), needs, strict=True))
    held = saved_bytes(lambda: batch_norm(x, p.running_mean, p.running_var, weight, bias, training))
    per_channel = 5 * (4 + 2 * 8)  # the weight, and save_stats
    activation = x.numel() * x.element_size()
    if holds_input:
        assert activation <= held <= activation + per_channel
    else:
        assert 0 < held <= per_channel


@MODES
def test_without_gradients_the_graph_holds_nothing(training: bool, device: str) -> None:
    x, p = make_input((6, 5, 7, 3), device=device), make_parameters(5, device=device)

    def run() -> Tensor:
        y = batch_norm(x, p.running_mean, p.running_var, p.weight, p.bias, training)
        assert y.grad_fn is None
        return y

    assert saved_bytes(run) == 0


@MODES
def test_save_stats_carry_no_gradient(training: bool) -> None:
    x, weight, bias = leaves((4, 3))
    p = make_parameters(3, torch.float64)
    if training:
        y, stats, _ = torch.ops.bnext.batch_norm_train(x, weight, bias, None, None, None, 0.1, 1e-5)
    else:
        y, stats, _ = torch.ops.bnext.batch_norm_eval(x, weight, bias, p.running_mean, p.running_var, 1e-5)
    assert y.requires_grad
    assert not stats.requires_grad


def test_activation_checkpointing(device: str) -> None:
    # The forward pass runs again inside backward, on statistics that it has already moved.
    x, g = make_input((6, 5, 7, 3), device=device), make_grad((6, 5, 7, 3), device=device)

    def gradient(checkpointed: bool) -> tuple[Tensor, Tensor, Tensor]:
        module, leaf = bnext.BatchNorm2d(5, device=device), x.detach().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(module, leaf, use_reentrant=False) if checkpointed else module(leaf)
        y.backward(g)
        return leaf.grad, module.weight.grad, module.bias.grad

    for a, b in zip(gradient(True), gradient(False), strict=True):
        assert same_bits(a, b)
