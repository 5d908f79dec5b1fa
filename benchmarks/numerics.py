"""``python -m benchmarks numerics``: each case on each path, by bnext and by torch, against float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.correctness import away_from_kinks
from benchmarks.numerics_cases import PATHS, Case, by_channel, in_path, make_arguments
from benchmarks.numerics_report import FLOOR, QUANTITIES, RELATIVE, ULP, Results, judged
from benchmarks.operators import GRADIENTS, BatchNorm, Tensors, functions
from benchmarks.provenance import provenance

# The quantities that are exact for a constant channel: xhat is 0, and so is every product with it.
EXACT_IF_CONSTANT = ("output", "grad_weight", "running_var")


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
        """A sum of many terms that are rounded, or cancel, has an error that grows with their norm."""
        total = terms.sum(1, keepdim=True)
        return Exact(total, torch.maximum(total.abs(), terms.square().sum(1, keepdim=True).sqrt()))


class Error(NamedTuple):
    """The largest error of a quantity; NaN where a result is NaN."""

    value: float
    unit: str


def exact_results(case: Case, arguments: Tensors) -> dict[str, Exact]:
    """The exact values of each quantity."""
    weight, bias = (vector.double()[:, None] for vector in (arguments.weight, arguments.bias))
    x, g = (by_channel(data).double() for data in (arguments.input, arguments.grad_output))
    count = x.shape[1]
    results = {}
    if case.training:
        # To subtract a channel's first value loses no accuracy for data far from zero, and makes a constant channel
        # exact.
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
        g *= z > 0
        z = z.clamp_(min=0)
    results["output"] = Exact.of(z)
    results["grad_weight"], results["grad_bias"] = Exact.sum(g * xhat), Exact.sum(g)
    if case.training:
        mean_g, mean_gx = (results[name].values / count for name in ("grad_bias", "grad_weight"))
        g = g.sub_(mean_g).sub_(xhat.mul_(mean_gx))
    results["grad_input"] = Exact.of(g.mul_(weight * invstd))
    return results


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
    # A value beyond the dtype's range is correctly rounded to infinity.
    difference.masked_fill_(rows.isinf() & (rows == exact.values.to(rows.dtype)), 0)
    if is_data and rows.dtype.itemsize == 2:
        spacing = ulp(torch.maximum(exact.values.abs(), exact.size * FLOOR), rows.dtype)
        return Error(float((difference / spacing).amax()), ULP)
    # Subnormal numbers have the spacing of the smallest normal ones.
    size = exact.size.clamp(min=torch.finfo(rows.dtype).tiny)
    size = size.masked_fill(exact.size == 0, 1)
    return Error(float((difference / size).amax()), RELATIVE)


def results_of(function: BatchNorm, case: Case, arguments: Tensors, path: str) -> dict[str, Tensor]:
    """The results and updates of a call and its backward pass, by quantity."""
    a = arguments
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (in_path(a.input, path), a.weight, a.bias)]
    residual = [in_path(tensor, path).requires_grad_() for tensor in a.residual]
    running_mean, running_var = a.running_mean.clone(), a.running_var.clone()
    # With momentum 1 the running variance is the batch's own.
    output = function(leaves[0], running_mean, running_var, *leaves[1:], *residual, case.training, 1.0, case.eps)
    gradients = torch.autograd.grad(output, leaves, in_path(a.grad_output, path))
    results = {"output": output.detach(), **dict(zip(GRADIENTS, gradients, strict=False))}
    return {**results, "running_var": running_var} if case.training else results


def rows_of(case: Case, providers: Mapping[str, BatchNorm]) -> list[dict[str, Any]]:
    """One row per path and quantity."""
    rows = []
    with set_torch_threads(1):  # these tensors are too small for two threads
        arguments = away_from_kinks(case.epilogue, make_arguments(case))
        exact = exact_results(case, arguments)
    for path in PATHS:
        actual = {name: results_of(function, case, arguments, path) for name, function in providers.items()}
        for quantity in filter(exact.__contains__, QUANTITIES):
            with set_torch_threads(1):
                errors = {name: error_of(found[quantity], exact[quantity]) for name, found in actual.items()}
            row = {"case": case.name, "dtype": case.dtype, "path": path, "quantity": quantity}
            row |= {"unit": errors["bnext"].unit, **{name: error.value for name, error in errors.items()}}
            rows.append({**row, "exact": case.constant and quantity in EXACT_IF_CONSTANT})
    return rows


def measure(cases: Sequence[Case], advance: Callable[[str, int], None]) -> Results:
    """``advance`` is called with the next case and the number of cases finished since the last call."""
    rows = []
    for case in cases:
        advance(f"{case.name} {case.dtype}", 0)
        rows += rows_of(case, functions(case.epilogue))
        advance(f"{case.name} {case.dtype}", 1)
    return judged(asdict(provenance(torch.get_num_threads())), rows)
