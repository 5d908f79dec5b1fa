"""What a batch norm should give, in float64 from the formula, and how far from it a result is."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.numerics_cases import KINK, Case, by_channel
from benchmarks.numerics_report import FLOOR, RELATIVE, ULP
from benchmarks.operators import Tensors


@dataclass(frozen=True)
class Exact:
    """A quantity's values in float64, (C, count) or (C, 1), and the size, (C, 1), that an error is compared with."""

    values: Tensor
    size: Tensor

    @staticmethod
    def of(values: Tensor) -> "Exact":
        return Exact(values, values.abs().amax(1, keepdim=True))

    @staticmethod
    def sum(terms: Tensor) -> "Exact":
        """So many terms that round, or cancel, leave an error that grows with their norm."""
        total = terms.sum(1, keepdim=True)
        return Exact(total, torch.maximum(total.abs(), terms.square().sum(1, keepdim=True).sqrt()))


@dataclass(frozen=True)
class Error:
    """The largest of a quantity; NaN where a result is NaN."""

    value: float
    unit: str


def exact_results(case: Case, arguments: Tensors) -> tuple[dict[str, Exact], Tensors]:
    """Each quantity; and the arguments with a grad_output that is 0 near a kink."""
    weight, bias = (vector.double()[:, None] for vector in (arguments.weight, arguments.bias))
    x = by_channel(arguments.input).double()
    count = x.shape[1]
    results = {}
    if case.training:
        # Moving the origin to a channel's first value costs nothing for data far from zero, and makes a constant
        # channel exact.
        centred = x.sub_(x[:, :1].clone())
        centred = centred.sub_(centred.mean(1, keepdim=True))
        var = centred.square().mean(1, keepdim=True)
        results["running_var"] = Exact.of(var * (count / (count - 1)))
    else:
        centred = x.sub_(arguments.running_mean.double()[:, None])
        var = arguments.running_var.double()[:, None]
    invstd = (var + case.eps).rsqrt()
    xhat = centred.mul_(invstd)
    z = xhat * weight + bias
    for residual in arguments.residual:
        z += by_channel(residual).double()

    if case.epilogue.act:
        arguments = replace(arguments, grad_output=_away_from_kinks(arguments.grad_output, z))
    g = by_channel(arguments.grad_output).double()
    if case.epilogue.act:
        g *= z > 0
        z = z.clamp_(min=0)
    results["output"] = Exact.of(z)
    results["grad_weight"], results["grad_bias"] = Exact.sum(g * xhat), Exact.sum(g)
    if case.training:
        mean_g, mean_gx = (results[name].values / count for name in ("grad_bias", "grad_weight"))
        g = g.sub_(mean_g).sub_(xhat.mul_(mean_gx))
    results["grad_input"] = Exact.of(g.mul_(weight * invstd))
    return results, arguments


def _away_from_kinks(grad_output: Tensor, z: Tensor) -> Tensor:
    n, c, *spatial = grad_output.shape
    near = (z.abs() < KINK).view(c, n, *spatial).transpose(0, 1)
    return grad_output.masked_fill(near, 0)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of the dtype's numbers at each float64 value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def error_of(actual: Tensor, exact: Exact) -> Error:
    """The largest error, measured as numerics_report.LEGEND explains."""
    is_data = actual.dim() > 1
    rows = by_channel(actual) if is_data else actual.detach()[:, None]
    difference = (rows.double() - exact.values).abs_()
    # What the dtype does not hold is rounded to infinity, and right so.
    difference.masked_fill_(rows.isinf() & (rows == exact.values.to(rows.dtype)), 0)
    if is_data and rows.dtype.itemsize == 2:
        spacing = ulp(torch.maximum(exact.values.abs(), exact.size * FLOOR), rows.dtype)
        return Error(float((difference / spacing).amax()), ULP)
    # Numbers below the smallest normal one are as far apart as those above it.
    size = exact.size.clamp(min=torch.finfo(rows.dtype).tiny)
    size = size.masked_fill(exact.size == 0, 1)
    return Error(float((difference / size).amax()), RELATIVE)
