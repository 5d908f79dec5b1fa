"""The accuracy of each activation: at every number of half precision, and where a formula would cancel."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import reference
import tolerances
import torch
from cases import LOW_PRECISION, name
from marks import EVERY_ACT
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm_act


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype, as (N, 1, H, W)."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].reshape(2, 1, 8, -1)


def activated(z: Tensor, act: Act) -> Tensor:
    """act of pre-activations that are exact: with a weight of zero they are the residual."""
    zero, one = torch.zeros(z.shape[1], dtype=torch.float32), torch.ones(z.shape[1], dtype=torch.float32)
    return batch_norm_act(torch.ones_like(z), zero, one, zero, None, z, act=act)


# A smaller result may be 0, since exp and erfc underflow in float32. Only bfloat16 has numbers as small as that.
FLOOR = 2.0**-118


@EVERY_ACT
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_every_number_of_half_precision(dtype: torch.dtype, act: Act) -> None:
    """No output is more than an ulp off, and few outputs are not the nearest number."""
    z = every_finite(dtype).requires_grad_()
    y = activated(z, act)
    wide = reference.widen(z)
    expected = reference.activate(wide, act)
    assert_within(y, expected, tolerances.ulp(expected, dtype).clamp(min=FLOOR), "output")
    # An output misses the nearest number only if the exact value is within a few float32 roundings of a tie.
    missed = (y != expected.to(dtype)) & (expected.abs() > FLOOR)
    assert missed.double().mean() <= 2.0**-24 / torch.finfo(dtype).eps * 16

    (grad,) = torch.autograd.grad(y, z, torch.ones_like(z))
    slope = reference.slope_at(wide, act)
    limit = tolerances.ulp(slope, dtype) + 4 * 2.0**-24 * (1 + wide.abs().clamp(max=40))
    assert_within(grad, slope, limit, "grad_residual")


@pytest.mark.parametrize(
    ("act", "low", "high", "exact"),
    [
        # z*(1 + erf(z/sqrt 2))/2 has lost every digit at z = -5.5: erfc has not.
        ("gelu", -8.0, 0.5, lambda v: v * math.erfc(-v * math.sqrt(0.5)) / 2),
        ("silu", -80.0, 0.5, lambda v: v / (1 + math.exp(-v))),
        ("mish", -80.0, 0.5, lambda v: v * math.tanh(math.log1p(math.exp(v)))),
        # e^z - 1 has lost half of its digits at z = -1e-4.
        ("elu", -1e-3, 1e-3, lambda v: max(v, math.expm1(min(v, 0.0)))),
    ],
    ids=["gelu", "silu", "mish", "elu"],
)
def test_small_values_keep_their_relative_accuracy(
    act: Act, low: float, high: float, exact: Callable[[float], float]
) -> None:
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 1e-14)):
        z = torch.linspace(low, high, 4001, dtype=dtype)[:-1].reshape(4, 1, 1000)
        expected = torch.tensor([exact(v) for v in z.flatten().tolist()], dtype=torch.float64).reshape(z.shape)
        assert_within(activated(z, act), expected, relative * expected.abs(), "output")
