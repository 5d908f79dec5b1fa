"""The backward pass against the float64 reference: contract section 2, rows eval, edge cases and autograd.

Of the plain op, and of act(batch_norm(input) + residual): without a residual, an `act` of None is the plain op.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    ACTS,
    DENSE_CASES,
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    LARGE_CASES,
    LOW_PRECISION,
    MEDIUM_CASES,
    MISALIGNED_CASES,
    STRIDED_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
    same_bits,
    without_repeats,
)
from checks import call, check_backward, significant_strides
from marks import EVERY_ACT, FEW, FLAGS, LARGER_THAN_THE_CACHE, MODES, PLAIN_OR_ACT, pairs
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels

backward = torch.ops.bnext.batch_norm_backward

# The kernels of either layout, at either width.
EITHER_LAYOUT = [
    (Case((3, 5, 5, 3), "contiguous"), torch.float32),
    (Case((3, 5, 5, 3), "channels_last"), torch.bfloat16),
]


@pairs(case=[*DENSE_CASES, *MISALIGNED_CASES], dtype=DTYPES, training=FLAGS)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    g = make_grad(case.shape, "contiguous", dtype, device)
    check_backward(x, g, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.not_emulated
@pairs(case=DENSE_CASES, dtype=DTYPES, act=FEW_ACTS, training=FLAGS, has_residual=FLAGS)
def test_every_shape_with_an_epilogue(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x, g = make_input(*case, dtype, device), make_grad(case.shape, "contiguous", dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_backward(x, g, params, training=training, residual=residual, act=act)


@pytest.mark.not_emulated  # they are copied above the kernels
@pairs(case=STRIDED_CASES, dtype=DTYPES, act=(None, "relu", "gelu"), training=FLAGS, has_residual=FLAGS)
def test_every_stride_pattern(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x, g = make_input(*case, dtype, device), make_grad(case.shape, "contiguous", dtype, device)
    residual = make_residual(case.shape, without_repeats(case.layout), dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_backward(x, g, params, training=training, residual=residual, act=act)


@pytest.mark.parametrize(("case", "dtype"), EITHER_LAYOUT, ids=name)
@pairs(act=ACTS, training=FLAGS, has_residual=FLAGS)
def test_every_activation(
    case: Case, dtype: torch.dtype, act: Act, has_residual: bool, training: bool, device: str
) -> None:
    x, g = make_input(*case, dtype, device), make_grad(*case, dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    check_backward(x, g, make_parameters(5, device=device), training=training, residual=residual, act=act)


@pytest.mark.not_emulated
@pairs(case=LARGE_CASES, dtype=DTYPES, act=(None, "relu", "gelu"), training=FLAGS, has_residual=FLAGS)
def test_across_chunks(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    g = make_grad(case.shape, case.layout if x.ndim == 4 else "contiguous", dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_backward(x, g, params, training=training, residual=residual, act=act)


@pytest.mark.not_emulated
@LARGER_THAN_THE_CACHE
def test_gradient_larger_than_the_cache(layout: str, act: Act, training: bool, dtype: torch.dtype, device: str) -> None:
    shape = (44 // dtype.itemsize, 64, 112, 112)  # 35 MB, see test_forward
    x, g = make_input(shape, layout, dtype, device), make_grad(shape, layout, dtype, device)
    residual = make_residual(shape, layout, dtype, device) if act else None
    check_backward(x, g, make_parameters(64, dtype, device), training=training, residual=residual, act=act)


@pairs(
    case=[*FEW_CASES, *MEDIUM_CASES],
    dtype=(torch.float32, torch.bfloat16),
    act=(None, "relu", "gelu"),
    training=FLAGS,
    has_residual=FLAGS,
)
def test_every_instruction_set(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, isa: str
) -> None:
    x, g = make_input(*case, dtype), make_grad(*case, dtype)
    residual = make_residual(*case, dtype) if has_residual else None
    check_backward(x, g, make_parameters(case.shape[1]), training=training, residual=residual, act=act)


@EVERY_ACT
def test_every_activation_on_every_instruction_set(act: Act, isa: str) -> None:
    x, g, residual = (make(*MEDIUM_CASES[0]) for make in (make_input, make_grad, make_residual))
    for training, added in ((True, residual), (False, None)):
        check_backward(x, g, make_parameters(3), training=training, residual=added, act=act)


ANY_LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "transposed", "expanded", "expanded_channels")


@pytest.mark.not_emulated
@pairs(
    grad_layout=ANY_LAYOUTS,
    residual_layout=ANY_LAYOUTS,
    layout=("contiguous", "channels_last", "sliced"),
    dtype=(torch.float32, torch.bfloat16),
    act=(None, "relu", "silu"),
    training=FLAGS,
)
def test_grad_output_and_residual_of_any_stride(
    grad_layout: str,
    residual_layout: str,
    layout: str,
    dtype: torch.dtype,
    act: Act,
    training: bool,
    device: str,
) -> None:
    shape = (6, 5, 7, 3)
    x, g = make_input(shape, layout, dtype, device), make_grad(shape, grad_layout, dtype, device)
    residual = make_residual(shape, residual_layout, dtype, device) if act else None
    check_backward(x, g, make_parameters(5, device=device), training=training, residual=residual, act=act)


@pairs(case=FEW_CASES, act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_grad_output_expanded_from_one_number(
    case: Case, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    # What y.sum().backward() hands over: all strides zero.
    x = make_input(*case, torch.float32, device)
    g = torch.tensor(0.75, device=device).expand(case.shape)
    residual = make_residual(case.shape, device=device) if has_residual else None
    params = make_parameters(case.shape[1], device=device)
    check_backward(x, g, params, training=training, residual=residual, act=act)


@pairs(
    mix=["".join(choices) for choices in itertools.product("if", repeat=3)],
    dtype=(torch.float64, *LOW_PRECISION),
    act=(None, "relu", "gelu"),
    training=FLAGS,
    has_residual=FLAGS,
)
def test_gradients_have_the_dtypes_of_the_parameters(
    mix: str, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    # i: the input's dtype, f: float32; for weight, bias and running statistics. grad_residual has the input's.
    weight, bias, stats = (torch.float32 if choice == "f" else dtype for choice in mix)
    params = make_parameters(5, (weight, bias, stats, stats), device)
    x, g = (make((3, 5, 5, 3), dtype=dtype, device=device) for make in (make_input, make_grad))
    residual = make_residual((3, 5, 5, 3), dtype=dtype, device=device) if has_residual else None
    check_backward(x, g, params, training=training, residual=residual, act=act)


def forward_for_backward(x: torch.Tensor, weight: torch.Tensor | None, training: bool) -> torch.Tensor:
    """save_stats of a forward pass of either mode."""
    if training:
        return torch.ops.bnext.batch_norm_train(x, weight, None, None, None, None, 0.1, 1e-5)[1]
    params = make_parameters(x.shape[1], parameter_dtype(x.dtype), str(x.device))
    return torch.ops.bnext.batch_norm_eval(x, weight, None, params.running_mean, params.running_var, 1e-5)[1]


@pairs(case=FEW_CASES, dtype=DTYPES, training=FLAGS)
def test_output_mask_computes_what_is_asked_and_nothing_else(
    case: Case, dtype: torch.dtype, training: bool, device: str
) -> None:
    x, g = make_input(*case, dtype, device), make_grad(case.shape, "contiguous", dtype, device)
    weight = make_parameters(case.shape[1], dtype, device).weight
    stats = forward_for_backward(x, weight, training)
    everything = backward(g, x, weight, stats, training, 1e-5, [True, True, True, False])
    assert [t.dtype for t in everything] == [dtype, parameter_dtype(dtype), parameter_dtype(dtype), dtype]
    for mask in itertools.product((True, False), repeat=3):
        results = backward(g, x, weight, stats, training, 1e-5, [*mask, False])
        for asked, got, want in zip([*mask, False], results, everything, strict=True):
            if asked:
                assert same_bits(got, want), mask
            else:
                assert got.shape == (0,), mask


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_input_may_be_left_out_where_no_result_depends_on_it(case: Case, training: bool, device: str) -> None:
    x = make_input(*case, device=device)
    # Without the input grad_output's layout decides the order of the sums, so it is the input's.
    g = torch.empty_like(x).copy_(make_grad(case.shape, device=device))
    weight = make_parameters(case.shape[1], device=device).weight
    stats = forward_for_backward(x, weight, training)
    masks = [(False, False, True)] if training else [(False, False, True), (True, False, False), (True, False, True)]
    for mask in masks:
        with_input = backward(g, x, weight, stats, training, 1e-5, [*mask, False])
        without = backward(g, None, weight, stats, training, 1e-5, [*mask, False])
        for a, b in zip(with_input, without, strict=True):
            assert same_bits(a, b), mask


@MODES
def test_weight_may_be_left_out(training: bool, device: str) -> None:
    x, g = make_input((6, 5, 7, 3), device=device), make_grad((6, 5, 7, 3), device=device)
    stats = forward_for_backward(x, None, training)
    ones = torch.ones(5, device=device)
    for a, b in zip(
        backward(g, x, None, stats, training, 1e-5, [True, True, True, False]),
        backward(g, x, ones, stats, training, 1e-5, [True, True, True, False]),
        strict=True,
    ):
        assert same_bits(a, b)


@pairs(shape=((0, 3), (0, 3, 4, 5), (2, 3, 0)), dtype=DTYPES, act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_empty_batch_has_zero_parameter_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    residual = torch.empty_like(x, requires_grad=True) if has_residual else None
    p = make_parameters(3, parameter_dtype(dtype), device)
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    y = call(x, p, weight, bias, training, residual=residual, act=act)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert residual is None or (residual.grad.shape, residual.grad.dtype) == (shape, dtype)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pairs(
    layout=("contiguous", "channels_last", "sliced", "transposed"),
    other=("contiguous", "channels_last"),
    act=PLAIN_OR_ACT,
)
def test_grad_input_has_the_strides_that_torch_gives_it(layout: str, other: str, act: Act, device: str) -> None:
    x = make_input((6, 5, 7, 3), layout, device=device).requires_grad_()
    g, residual = (make((6, 5, 7, 3), other, device=device) for make in (make_grad, make_residual))
    y = (
        batch_norm_act(x, None, None, residual=residual, training=True, act=act)
        if act
        else batch_norm(x, None, None, training=True)
    )
    (ours,) = torch.autograd.grad(y, x, g)
    (theirs,) = torch.autograd.grad(torch.nn.functional.batch_norm(x, None, None, training=True), x, g)
    assert significant_strides(ours) == significant_strides(theirs)


@pairs(act=PLAIN_OR_ACT, training=FLAGS)
def test_frozen_parameters_get_no_gradient(act: Act, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    residual = make_residual((6, 5, 7, 3), device=device) if act else None
    p = make_parameters(5, device=device)
    call(x, p, p.weight, p.bias, training, residual=residual, act=act).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(t is None or t.grad is None for t in (p.weight, p.bias, residual))


@pytest.mark.not_emulated
@pairs(case=FEW_CASES, dtype=DTYPES, training=FLAGS)
def test_identity_has_the_bits_of_plain_batch_norm(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x, g = make_input(*case, dtype, device), make_grad(case.shape, dtype=dtype, device=device)
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    plain = check_backward(x, g, params, training=training)
    fused = check_backward(x, g, params, training=training, act="identity")
    residual = make_residual(case.shape, dtype=dtype, device=device)
    *added, grad_residual = check_backward(x, g, params, training=training, residual=residual, act="identity")
    assert all(map(same_bits, fused, plain))
    assert all(map(same_bits, added, plain))
    assert same_bits(grad_residual, g)


def gradients(needs: tuple[bool, ...], values: tuple[Tensor, ...], g: Tensor, training: bool, act: Act) -> list[Tensor]:
    """Of those of (input, weight, bias, residual) that need one, in eval mode with fixed running statistics."""
    leaves = [value.detach().requires_grad_(n) for value, n in zip(values, needs, strict=True)]
    x, weight, bias, residual = leaves
    mean, var = torch.full_like(weight, 0.5), torch.full_like(weight, 1.5)
    y = batch_norm_act(x, mean, var, weight, bias, residual, training, act=act)
    return list(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], g))


@pytest.mark.not_emulated
@pairs(case=FEW_CASES[:4], act=FEW_ACTS, training=FLAGS)
def test_every_subset_of_gradients_has_the_same_bits(case: Case, act: Act, training: bool, device: str) -> None:
    # What else is asked for decides what is kept (a mask, the pre-activation's factors), not what comes out.
    p = make_parameters(case.shape[1], device=device)
    values = (make_input(*case, device=device), p.weight, p.bias, make_residual(*case, device=device))
    # In the layout of the input: without the input, grad_output's decides the order of the sums.
    g = make_grad(*case, device=device)
    everything = gradients((True,) * 4, values, g, training, act)
    for needs in itertools.product((True, False), repeat=4):
        if any(needs):
            wanted = itertools.compress(everything, needs)
            assert all(map(same_bits, gradients(needs, values, g, training, act), wanted)), needs


@pytest.mark.not_emulated
@MODES
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0, 3.0, -1.0, 1], ids=str)  # beyond 1, max(z, slope*z) is wrong
def test_any_finite_slope(slope: float, training: bool, device: str) -> None:
    x, g, residual = (make((6, 5, 7, 3), device=device) for make in (make_input, make_grad, make_residual))
    params = make_parameters(5, device=device)
    for added in (None, residual):
        check_backward(x, g, params, training=training, residual=added, act=("leaky_relu", slope))


@pytest.mark.not_emulated
@MODES
@FEW
def test_the_input_may_be_its_own_residual(act: Act, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x, g = make_input(*case, device=device), make_grad(case.shape, device=device)
        p = make_parameters(case.shape[1], device=device)
        leaf = x.detach().requires_grad_()
        y = batch_norm_act(
            leaf, p.running_mean.clone(), p.running_var.clone(), p.weight, p.bias, leaf, training, act=act
        )
        (total,) = torch.autograd.grad(y, leaf, g)
        parts = check_backward(x, g, p, training=training, residual=x, act=act)
        assert same_bits(total, parts[0] + parts[3])


@pytest.mark.not_emulated
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "relu6", ("leaky_relu", -0.5), "hardswish", "elu", ("elu", 0.5)], ids=name)
def test_at_a_kink_the_derivative_is_torchs(act: Act, layout: str, device: str) -> None:
    # With a weight of zero z is the residual, without an error: on the kink, beside it, and -0.
    kinks = (-3.0, 0.0, 3.0, 6.0)
    beside = [float(torch.nextafter(torch.tensor(k), torch.tensor(k + s))) for k in kinks for s in (-1.0, 1.0)]
    z = torch.tensor([*kinks, *beside, -0.0, 5.0, -5.0, 7.0]).repeat(9).reshape(2, 3, 6, 4).to(device)
    residual = torch.empty_like(z, memory_format=torch.preserve_format)
    residual = residual.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else residual
    residual.copy_(z).requires_grad_()
    x = make_input((2, 3, 6, 4), layout, device=device)
    zeros = torch.zeros(3, device=device)
    g = make_grad((2, 3, 6, 4), layout, device=device)
    for training in (True, False):
        y = batch_norm_act(x, zeros.clone(), zeros + 1, zeros, None, residual, training, act=act)
        (ours,) = torch.autograd.grad(y, residual, g)
        leaf = z.clone().requires_grad_()
        functional = torch.nn.functional
        following, *slope = act if isinstance(act, tuple) else (act,)
        expected = getattr(functional, following)(leaf, *slope)
        (theirs,) = torch.autograd.grad(expected, leaf, g)
        assert torch.allclose(ours, theirs, rtol=2.0**-21, atol=0), training  # a few roundings; a jump is 1/2 of g


@pytest.mark.not_emulated
@MODES
def test_relu_equals_a_relu_that_follows(training: bool, device: str) -> None:
    # Where the pre-activation is computed alike, relu only selects: the same bits, forward and backward. But training's
    # sums are of values shifted otherwise (coarse_shift in csrc/common), and their means differ by roundings.
    for case in FEW_CASES:
        x, g = make_input(*case, device=device).requires_grad_(), make_grad(*case, device=device)
        p = make_parameters(case.shape[1], device=device)
        stats = [p.clone(), p.clone()]
        y = batch_norm_act(x, stats[0].running_mean, stats[0].running_var, p.weight, p.bias, training=training)
        plain = batch_norm(x, stats[1].running_mean, stats[1].running_var, p.weight, p.bias, training)
        expected = torch.nn.functional.relu(plain)
        assert torch.equal(y, expected)
        (got,), (selected,) = (torch.autograd.grad(t, x, g) for t in (y, expected))
        if training:
            assert_within(got, selected, 2.0**-22 * float(selected.abs().max()), "grad_input")
        else:
            assert same_bits(got, selected)
