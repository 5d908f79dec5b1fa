"""The backward pass against the float64 reference: contract section 2, rows eval, edge cases and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    LARGE_CASES,
    LOW_PRECISION,
    MEDIUM_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    name,
    parameter_dtype,
    same_bits,
)
from checks import check_backward, significant_strides

from bnext.functional import batch_norm

pytestmark = pytest.mark.kernels

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
backward = torch.ops.bnext.batch_norm_backward


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    g = make_grad(case.shape, "contiguous", dtype, device)
    check_backward(x, g, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", LARGE_CASES, ids=name)
def test_across_chunks(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    layout = case.layout if x.ndim == 4 else "contiguous"
    g = make_grad(case.shape, layout, dtype, device)
    check_backward(x, g, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_larger_than_the_cache(layout: str, training: bool, device: str) -> None:
    shape = (11, 64, 112, 112)  # 35 MB, see test_forward
    x, g = make_input(shape, layout, torch.float32, device), make_grad(shape, layout, torch.float32, device)
    check_backward(x, g, make_parameters(64, torch.float32, device), training=training)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", [*FEW_CASES, *MEDIUM_CASES], ids=name)
def test_every_instruction_set(case: Case, dtype: torch.dtype, training: bool, isa: str) -> None:
    x = make_input(*case, dtype)
    g = make_grad(case.shape, case.layout, dtype)
    check_backward(x, g, make_parameters(case.shape[1]), training=training)


GRAD_LAYOUTS = ("contiguous", "channels_last", "offset", "sliced", "transposed", "expanded", "expanded_channels")


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_grad_output_of_any_stride(
    layout: str, grad_layout: str, dtype: torch.dtype, training: bool, device: str
) -> None:
    shape = (6, 5, 7, 3)
    x, g = make_input(shape, layout, dtype, device), make_grad(shape, grad_layout, dtype, device)
    check_backward(x, g, make_parameters(5, device=device), training=training)


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_grad_output_expanded_from_one_number(case: Case, training: bool, device: str) -> None:
    # What y.sum().backward() hands over: all strides zero.
    x = make_input(*case, torch.float32, device)
    g = torch.tensor(0.75, device=device).expand(case.shape)
    check_backward(x, g, make_parameters(case.shape[1], device=device), training=training)


@MODES
@pytest.mark.parametrize("mix", list(itertools.product("if", repeat=2)), ids="".join)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=name)
def test_gradients_have_the_dtypes_of_the_parameters(
    dtype: torch.dtype, mix: tuple[str, ...], training: bool, device: str
) -> None:
    # i: the input's dtype, f: float32; for weight and bias.
    weight, bias = (torch.float32 if choice == "f" else dtype for choice in mix)
    for stats in (dtype, torch.float32):
        params = make_parameters(5, (weight, bias, stats, stats), device)
        x, g = make_input((3, 5, 5, 3), dtype=dtype, device=device), make_grad((3, 5, 5, 3), dtype=dtype, device=device)
        check_backward(x, g, params, training=training)


def forward_for_backward(x: torch.Tensor, weight: torch.Tensor | None, training: bool) -> torch.Tensor:
    """save_stats of a forward pass of either mode."""
    if training:
        return torch.ops.bnext.batch_norm_train(x, weight, None, None, None, None, 0.1, 1e-5)[1]
    params = make_parameters(x.shape[1], parameter_dtype(x.dtype), str(x.device))
    return torch.ops.bnext.batch_norm_eval(x, weight, None, params.running_mean, params.running_var, 1e-5)[1]


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
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


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 5), (2, 3, 0)], ids=str)
def test_empty_batch_has_zero_parameter_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, training: bool, device: str
) -> None:
    x = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    p = make_parameters(3, parameter_dtype(dtype), device)
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    y = batch_norm(x, p.running_mean, p.running_var, weight, bias, training)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last"])
def test_grad_input_has_the_strides_that_torch_gives_it(layout: str, grad_layout: str, device: str) -> None:
    x = make_input((6, 5, 7, 3), layout, device=device).requires_grad_()
    g = make_grad((6, 5, 7, 3), grad_layout, device=device)
    (ours,) = torch.autograd.grad(batch_norm(x, None, None, training=True), x, g)
    (theirs,) = torch.autograd.grad(torch.nn.functional.batch_norm(x, None, None, training=True), x, g)
    assert significant_strides(ours) == significant_strides(theirs)


@MODES
def test_frozen_parameters_get_no_gradient(training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device).requires_grad_()
    p = make_parameters(5, device=device)
    batch_norm(x, p.running_mean, p.running_var, p.weight, p.bias, training).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert p.weight.grad is None
    assert p.bias.grad is None
