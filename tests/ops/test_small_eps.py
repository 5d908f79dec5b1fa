"""ε = 1e-8 in float32, as some texts have it: under a root, beside the variance, it is no rounding error.

Next to 1 it is: 1 + 1e-8 == 1. So where a constant channel's variance is rounding's alone, and the channel is far from
zero, nothing but exact statistics keeps 1/√(σ² + ε) from turning that rounding into an output of any size.
"""

from __future__ import annotations

import pytest
import torch
from cases import make_input, make_parameters, to_layout
from checks import check_call, make_inputs
from marks import MODES

from bnext.functional import batch_norm

pytestmark = pytest.mark.kernels

EPS = 1e-8
CASES = [((64, 5), "contiguous"), ((8, 5, 7, 7), "contiguous"), ((8, 5, 7, 7), "channels_last")]


@MODES
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_small_eps_is_as_right_as_any(shape: tuple[int, ...], layout: str, training: bool, device: str) -> None:
    check_call(make_inputs(shape, layout, device=device, grad_layout=layout), training=training, eps=EPS)


@pytest.mark.parametrize("std", [1e-3, 1e-4, 1e-5], ids="std={:g}".format)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_variance_of_the_size_of_eps(shape: tuple[int, ...], layout: str, std: float, device: str) -> None:
    inputs = make_inputs(shape, layout, device=device, grad_layout=layout)
    check_call(inputs._replace(input=std * inputs.input), training=True, eps=EPS)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4 / 3, 1e-12, -1e30], ids="{:g}".format)
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_constant_channel_is_exactly_bias(shape: tuple[int, ...], layout: str, value: float, device: str) -> None:
    x = make_input(shape, device=device)
    x[:, 1] = value
    x = to_layout(x, layout).requires_grad_()
    weight, bias, *_ = (t.requires_grad_() for t in make_parameters(shape[1], device=device))
    y = batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    assert torch.equal(y[:, 1], bias[1].expand_as(y[:, 1]))
    assert y.isfinite().all()
    # x̂ is zero there, whatever 1/√ε = 1e4 multiplies; and equal gradients ask for no change.
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert grad_weight[1] == 0
    assert torch.equal(grad_x[:, 1], torch.zeros_like(x[:, 1]))
