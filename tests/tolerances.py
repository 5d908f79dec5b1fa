"""How far a right answer may lie from the float64 reference. Every bound is derived here, none is tuned.

u is the unit roundoff of the arithmetic: 2^-24 where elements are handled in float32 (float32, float16 and
bfloat16 inputs), 2^-53 for float64.

Sums. A chain of additions adds a rounding error uniform in +-u|p_j| at each partial sum p_j, so of variance
u^2 p_j^2/3. With terms of mean t and standard deviation s the partial sums are j*t + sqrt(j)*s, and a chain of
length L has the variance u^2/3*(t^2 L^3/3 + s^2 L^2/2). m/L independent chains make

    std <= u*sqrt(m)*(|t|*L/3 + s*sqrt(L/6)) = u*(|sum|*L/(3 sqrt(m)) + norm2*sqrt(L/6)).

The bound is LAMBDA = 4 such standard deviations. float32 chains are flushed to double every CHAIN = 512 additions
or earlier; for float64 the chain may be the whole channel.

The walk takes the rounding errors for independent. Values that repeat (half precision knows few of them; a padded
image only one) round alike at each step, and their errors add up: a single chain of CHAIN such terms would exceed
these bounds, which is as it should be. It takes shorter chains to stay within them.

Statistics, in units of the standard deviation sigma of the channel. For sum((x - shift)^2) the first term rules:
relative error LAMBDA*u*sqrt(L)/3 of the variance, half of that of sigma, smaller by sqrt(m/L) where chains are
averaged. A shift that lies d*sigma from the mean costs a factor 1 + d^2; d <= 0.7 for a shift taken from a
sample. Together u*sqrt(L)/sqrt(m/L), and 2u for rounding the result: `statistics`. The mean's own error is
smaller (its terms change sign), and is given the same bound. It is held as a double, so that it is rounded to
2^-53 of itself, which matters where the spread is far smaller: `mean_rounding`.

Where bnext itself computes in float64 the reference errs as much as bnext does: such bounds are doubled.

Activations, of a pre-activation z that is off by e. The output is off by L*e, L the largest |act'|, and act itself
is evaluated to 4u|y| + 4u|z|: a few ulp of the result, or, as in z*(1 + erf(...)) far below zero, of its factors.
In the gradients act' stands at the wrong z: |act''|_max * e, and is evaluated to 4u(1 + |z|), since a 1 - s(z) that
cancels is off by u and is multiplied by z. Beyond |z| = 40 neither s nor P differs from 0 and 1, in any dtype. For
data of 16 bits silu, gelu and mish are evaluated more coarsely, y to 2^-16 of itself and act' to 2^-18, and so is elu's
act', which is alpha + y below zero.

    act         L                     |act''|_max   kinks: jump of act'
    relu        1                     0             0: 1
    relu6       1                     0             0: 1, 6: 1
    leaky_relu  max(1, |slope|)       0             0: |1 - slope|
    silu        1.0999 at z = 2.400   1/2 at 0      none
    gelu        1.1290 at z = sqrt 2  0.798 at 0    none
    hardswish   1.5 at 3              1/3           -3: 1/2, 3: 1/2
    mish        1.0885 at z = 1.491   0.6443        none
    elu         max(1, |alpha|)       |alpha|       0: |1 - alpha|

An element whose z lies within e of a kink may take the derivative of either side: at such elements, and at no
others, |g| times the jump is allowed. Together this is the slack of g*act'(z), `slack`. It enters the channel's sums
term by term, without the square root of a random walk: e is for the most part the error of the statistics, which
the whole channel shares.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import reference
import torch
from reference import Act, Forward, along_channels, reduced_dims, widen
from torch import Tensor

LAMBDA = 4.0
CHAIN = 512


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of the arithmetic; for float64 twice that, since the reference errs as much."""
    return 2.0**-53 * 2 if dtype == torch.float64 else 2.0**-24


def chain(count: int, dtype: torch.dtype) -> int:
    return max(1, count if dtype == torch.float64 else min(count, CHAIN))


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` at each (float64) value; that of the subnormals near zero."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def half_ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    return ulp(values, dtype) / 2


def statistics(count: int, dtype: torch.dtype) -> float:
    """The error of a channel's statistics, in units of its standard deviation."""
    length = chain(count, dtype)
    return unit(dtype) * (2 + math.sqrt(length) / math.sqrt(max(1.0, count / length)))


def mean_rounding(fwd: Forward) -> Tensor:
    """How far xhat moves because the mean, and the reference's, is stored as a double; shape (C,)."""
    return 2.0**-52 * fwd.mean.abs() * fwd.invstd


def summed(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Error of a sum of `terms` over all dimensions but the channel's; the terms themselves carry two roundings."""
    dims = reduced_dims(terms.ndim)
    count = terms.numel() // terms.shape[1]
    length = chain(count, dtype)
    total, norm = terms.sum(dims).abs(), terms.square().sum(dims).sqrt()
    walk = total * (length / (3 * math.sqrt(max(1, count)))) + norm * (math.sqrt(length / 6) + 2)
    return unit(dtype) * (LAMBDA * walk + total)


def preactivation(
    fwd: Forward,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    training: bool,
    has_residual: bool = False,
) -> Tensor:
    """|z - reference| where z is not rounded to a dtype: statistics shift and stretch xhat; then x - mean, the scale,
    the product and the sum are rounded once each, the bias twice, and the sum with the residual once."""
    ndim, u = fwd.xhat.ndim, unit(dtype)
    w = 1.0 if weight is None else along_channels(widen(weight).abs(), ndim)
    b = 0.0 if bias is None else along_channels(widen(bias).abs(), ndim)
    x = fwd.xhat.abs()
    error = w * x * 4 * u + b * 2 * u
    if training:
        error = error + w * (1 + x) * statistics(fwd.count, dtype)
        error = error + w * along_channels(mean_rounding(fwd), ndim)
    if has_residual:
        error = error + fwd.z.abs() * u
    return error


class Shape(NamedTuple):
    """An activation's largest |act'| and |act''|, and for each kink the jump of act' there."""

    steepest: float
    curvature: float
    kinks: dict[float, float]


def shape(act: Act) -> Shape:
    name, slope = reference.named(act)
    if name == "leaky_relu":
        return Shape(max(1.0, abs(slope)), 0.0, {0.0: abs(1 - slope)})
    if name == "elu":
        return Shape(max(1.0, abs(slope)), abs(slope), {0.0: abs(1 - slope)})
    return {
        "identity": Shape(1.0, 0.0, {}),
        "relu": Shape(1.0, 0.0, {0.0: 1.0}),
        "relu6": Shape(1.0, 0.0, {0.0: 1.0, 6.0: 1.0}),
        "silu": Shape(1.0999, 0.5, {}),
        "gelu": Shape(1.1290, 0.7979, {}),
        "hardswish": Shape(1.5, 1 / 3, {-3.0: 0.5, 3.0: 0.5}),
        "mish": Shape(1.0885, 0.6443, {}),
    }[name]


def only_selects(act: Act) -> bool:
    """Whether the activation passes or drops a value, and so rounds none."""
    return reference.named(act)[0] in ("identity", "relu", "relu6")


def coarseness(act: Act, dtype: torch.dtype) -> float:
    """The relative error of a coarse act(z); a quarter of it is the absolute error of act'(z)."""
    return 2.0**-16 if dtype.itemsize == 2 and reference.named(act)[0] in ("silu", "gelu", "mish", "elu") else 0.0


def output(
    fwd: Forward, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, *, act: Act = None, **about: bool
) -> Tensor:
    """|y - reference|: the error of z, the evaluation of the activation, and y rounded to its dtype."""
    error = preactivation(fwd, weight, bias, dtype, **about)
    error = error * shape(act).steepest
    if not only_selects(act):
        error = error + 4 * unit(dtype) * (fwd.output.abs() + fwd.z.abs())
    error = error + coarseness(act, dtype) * fwd.output.abs()
    return error + half_ulp(fwd.output.abs() + error, dtype)


def slack(
    grad_output: Tensor,
    fwd: Forward,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    act: Act = None,
    **about: bool,
) -> Tensor:
    """|g*act'(z) - reference| where the product is not rounded to a dtype."""
    e = preactivation(fwd, weight, bias, dtype, **about)
    activation = shape(act)
    error = activation.curvature * e
    for kink, jump in activation.kinks.items():
        # A z that is exact (weight, bias and residual of zero) lies on one side, or on the kink as in torch.
        error = torch.where((e > 0) & ((fwd.z - kink).abs() <= e), error + jump, error)
    if not only_selects(act):
        error = error + 4 * unit(dtype) * (1 + fwd.z.abs().clamp(max=40))
    return (error + coarseness(act, dtype) / 4) * widen(grad_output).abs()


def grad_input(
    grad_output: Tensor,
    fwd: Forward,
    weight: Tensor | None,
    dtype: torch.dtype,
    *,
    training: bool,
    slack: Tensor | float = 0.0,
) -> Tensor:
    """|grad_input - reference|: each of the three terms of g - mean(g) - xhat*mean(g*xhat) is rounded up to four
    times; the means carry the errors of their sums; xhat, in the term and in the sum, those of the statistics.

    g is what reaches batch norm: g*act'(z) behind an activation, with its `slack`.
    """
    g, ndim, u, m = widen(grad_output), grad_output.ndim, unit(dtype), max(1, fwd.count)
    x = fwd.xhat.abs()
    scale = along_channels(fwd.invstd * (1 if weight is None else widen(weight).abs()), ndim)
    error = g.abs() * 4 * u + slack
    if training:
        products = g * fwd.xhat
        mean_g = along_channels(g.sum(reduced_dims(ndim)).abs() / m, ndim)
        mean_gx = along_channels(products.sum(reduced_dims(ndim)).abs() / m, ndim)
        stat = statistics(fwd.count, dtype)
        error = error + (mean_g + x * mean_gx) * 4 * u
        error = (
            error + along_channels(summed(g, dtype) / m, ndim) + x * along_channels(summed(products, dtype) / m, ndim)
        )
        error = error + stat * ((1 + x) * mean_gx + x * mean_g + g.abs() + mean_g + x * mean_gx)
        error = error + along_channels(mean_rounding(fwd), ndim) * (mean_gx + x * mean_g)
        if isinstance(slack, Tensor):
            mean_slack, mean_slack_x = (t.sum(reduced_dims(ndim)) / m for t in (slack, slack * x))
            error = error + along_channels(mean_slack, ndim) + x * along_channels(mean_slack_x, ndim)
    error = error * scale
    exact = reference.backward(g, fwd, weight, training=training).input
    return error + half_ulp(exact.abs() + error, dtype)


def grad_bias(
    grad_output: Tensor, dtype: torch.dtype, result_dtype: torch.dtype, slack: Tensor | float = 0.0
) -> Tensor:
    g = widen(grad_output)
    error = summed(g, dtype)
    if isinstance(slack, Tensor):
        error = error + slack.sum(reduced_dims(g.ndim))
    return error + half_ulp(g.sum(reduced_dims(g.ndim)).abs() + error, result_dtype)


def grad_weight(
    grad_output: Tensor,
    fwd: Forward,
    dtype: torch.dtype,
    result_dtype: torch.dtype,
    *,
    training: bool,
    slack: Tensor | float = 0.0,
) -> Tensor:
    """sum(g*xhat): an error of the mean moves it by that of sum(g), an error of sigma stretches it."""
    g = widen(grad_output)
    products = g * fwd.xhat
    total, total_g = (t.sum(reduced_dims(g.ndim)).abs() for t in (products, g))
    error = summed(products, dtype) + 4 * unit(dtype) * (total + total_g)
    if training:
        error = error + statistics(fwd.count, dtype) * (total + total_g) + mean_rounding(fwd) * total_g
    if isinstance(slack, Tensor):
        error = error + (slack * fwd.xhat.abs()).sum(reduced_dims(g.ndim))
    return error + half_ulp(total + error, result_dtype)


def grad_residual(reaching: Tensor, slack: Tensor, dtype: torch.dtype, act: Act) -> Tensor:
    """|grad_residual - reference|, of g*act'(z) as it is returned: an activation that only selects rounds nothing."""
    return slack if only_selects(act) else slack + half_ulp(reaching.abs() + slack, dtype)


def running_stats(
    expected: tuple[Tensor, Tensor],
    fwd: Forward,
    momentum: float,
    dtype: torch.dtype,
    mean_dtype: torch.dtype,
    var_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The batch's share carries the error of the statistics; the update three roundings; storing it one more."""
    u, stat = unit(dtype), statistics(fwd.count, dtype)
    mean, var = expected
    sigma = fwd.var.sqrt()
    mean_error = momentum * (stat * sigma + 2 * u * fwd.mean.abs()) + 3 * u * mean.abs()
    var_error = momentum * 2 * fwd.var * 2 * stat + 3 * u * var.abs()
    return (
        mean_error + half_ulp(mean.abs() + mean_error, mean_dtype),
        var_error + half_ulp(var.abs() + var_error, var_dtype),
    )


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor | float, what: str) -> None:
    """Fail, with the worst element, unless |actual - expected| <= tolerance everywhere. A NaN is never within."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    got = widen(actual)
    limit = torch.as_tensor(tolerance, dtype=torch.float64).expand(expected.shape)
    error = (got - expected).abs()
    wrong = ~((error <= limit) | (got == expected))
    if not wrong.any():
        return
    ratio = torch.where(wrong, torch.nan_to_num(error / limit, nan=math.inf), 0.0)
    worst = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)) if ratio.ndim else ()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements off; worst at {worst}: got {got[worst].item()!r}, "
        f"expected {expected[worst].item()!r}, error {error[worst].item():.3e}, allowed {limit[worst].item():.3e}"
    )
