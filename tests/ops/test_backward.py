"""Gradients at kinks, and of some of the inputs only; test_forward.py compares gradients with the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import FEW_ACTS, FEW_CASES, Case, make_grad, make_input, name, same_bits, to_layout
from checks import make_inputs
from marks import FLAGS, MODES, pairs
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act


def gradients(needs: tuple[bool, ...], values: tuple[Tensor, ...], g: Tensor, training: bool, act: Act) -> list[Tensor]:
    """The gradients of those of input, weight, bias and residual that need one."""
    leaves = [value.detach().requires_grad_(n) for value, n in zip(values, needs, strict=True)]
    x, weight, bias, residual = leaves
    mean, var = torch.full_like(weight, 0.5), torch.full_like(weight, 1.5)
    y = batch_norm_act(x, mean, var, weight, bias, residual, training, act=act)
    return list(torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], g))


@pairs(case=FEW_CASES[:4], act=FEW_ACTS, training=FLAGS)
def test_every_subset_of_gradients_has_the_same_bits(case: Case, act: Act, training: bool, device: str) -> None:
    # Which gradients are needed decides what autograd saves (a mask, or the input), and must not change their values.
    # grad_output has the layout of the input, since without the input it decides the order of the sums.
    x, g, p, residual = make_inputs(*case, device=device, has_residual=True, grad_layout=case.layout)
    values = (x, p.weight, p.bias, residual)
    everything = gradients((True,) * 4, values, g, training, act)
    for needs in itertools.product((True, False), repeat=4):
        if any(needs):
            wanted = itertools.compress(everything, needs)
            assert all(map(same_bits, gradients(needs, values, g, training, act), wanted)), needs


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["relu", "relu6", ("leaky_relu", -0.5), "hardswish", "elu", ("elu", 0.5)], ids=name)
def test_at_a_kink_the_derivative_is_torchs(act: Act, layout: str, device: str) -> None:
    # With a weight of zero z is exactly the residual, which has values on each kink and beside it, and -0.
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


@MODES
def test_relu_equals_a_relu_that_follows(training: bool, device: str) -> None:
    # relu is the default. It only selects, so that the bits are those of torch's relu. But in training backward shifts
    # the values of its sums by another number (coarse_shift in csrc/common), and their means differ by roundings.
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
