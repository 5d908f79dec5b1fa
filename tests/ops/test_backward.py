"""Which gradients there are, of what strides, and their values at kinks; test_forward.py compares with the reference.

Of the plain op, and of act(batch_norm(input) + residual): without a residual, an `act` of None is the plain op.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    Case,
    Parameters,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
    same_bits,
    to_layout,
)
from checks import call, make_inputs, significant_strides
from marks import FLAGS, MODES, PLAIN_OR_ACT, pairs
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels


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
    without = Parameters(None, None, None, None)
    y = call(x, without, None, None, True, residual=residual if act else None, act=act)
    (ours,) = torch.autograd.grad(y, x, g)
    (theirs,) = torch.autograd.grad(torch.nn.functional.batch_norm(x, None, None, training=True), x, g)
    assert significant_strides(ours) == significant_strides(theirs)


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
    # grad_output is in the layout of the input: without the input, it decides the order of the sums.
    x, g, p, residual = make_inputs(*case, device=device, has_residual=True, grad_layout=case.layout)
    values = (x, p.weight, p.bias, residual)
    everything = gradients((True,) * 4, values, g, training, act)
    for needs in itertools.product((True, False), repeat=4):
        if any(needs):
            wanted = itertools.compress(everything, needs)
            assert all(map(same_bits, gradients(needs, values, g, training, act), wanted)), needs


@pytest.mark.not_emulated
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "relu6", ("leaky_relu", -0.5), "hardswish", "elu", ("elu", 0.5)], ids=name)
def test_at_a_kink_the_derivative_is_torchs(act: Act, layout: str, device: str) -> None:
    # With a weight of zero z is the residual, without an error: on the kink, beside it, and -0.
    kinks = (-3.0, 0.0, 3.0, 6.0)
    beside = [float(torch.nextafter(torch.tensor(k), torch.tensor(k + s))) for k in kinks for s in (-1.0, 1.0)]
    z = torch.tensor([*kinks, *beside, -0.0, 5.0, -5.0, 7.0]).repeat(9).reshape(2, 3, 6, 4).to(device)
    residual = to_layout(z, layout).detach().requires_grad_()
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
        x, g, p, _ = make_inputs(*case, device=device, grad_layout=case.layout)
        x = x.detach().requires_grad_()
        y = batch_norm_act(x, *p.clone()[2:], *p[:2], training=training)
        plain = batch_norm(x, *p.clone()[2:], *p[:2], training)
        expected = torch.nn.functional.relu(plain)
        assert torch.equal(y, expected)
        (got,), (selected,) = (torch.autograd.grad(t, x, g) for t in (y, expected))
        if training:
            assert_within(got, selected, 2.0**-22 * float(selected.abs().max()), "grad_input")
        else:
            assert same_bits(got, selected)
