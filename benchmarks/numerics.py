"""The run of ``python -m benchmarks numerics``: each case on each path, by bnext and by torch, against float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.numerics_cases import PATHS, Case, in_path, make_arguments
from benchmarks.numerics_error import Exact, error_of, exact_results
from benchmarks.numerics_report import QUANTITIES, Results, judged
from benchmarks.operators import BatchNorm, Tensors, functions
from benchmarks.provenance import provenance

# What a channel of one value leaves no room for rounding in: xhat is 0, and so is what it is a factor of.
EXACT_IF_CONSTANT = ("output", "grad_weight", "running_var")


def results_of(function: BatchNorm, case: Case, arguments: Tensors, path: str) -> dict[str, Tensor]:
    """What a call and its backward pass return and update, by quantity."""
    a = arguments
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (in_path(a.input, path), a.weight, a.bias)]
    residual = [in_path(tensor, path).requires_grad_() for tensor in a.residual]
    running_mean, running_var = a.running_mean.clone(), a.running_var.clone()
    # With momentum 1 the running variance is the batch's own.
    output = function(leaves[0], running_mean, running_var, *leaves[1:], *residual, case.training, 1.0, case.eps)
    gradients = torch.autograd.grad(output, leaves, in_path(a.grad_output, path))
    results = {"output": output.detach()}
    results.update(zip(("grad_input", "grad_weight", "grad_bias"), gradients, strict=True))
    if case.training:
        results["running_var"] = running_var
    return results


def rows_of(case: Case, providers: Mapping[str, BatchNorm]) -> list[dict[str, Any]]:
    """One row per path and quantity."""
    with set_torch_threads(1):  # these tensors are too small for a second one
        exact, arguments = exact_results(case, make_arguments(case))
    return [row for path in PATHS for row in _rows_of_path(case, arguments, path, exact, providers)]


def _rows_of_path(
    case: Case, arguments: Tensors, path: str, exact: Mapping[str, Exact], providers: Mapping[str, BatchNorm]
) -> list[dict[str, Any]]:
    errors = {}
    for name, function in providers.items():
        actual = results_of(function, case, arguments, path)
        with set_torch_threads(1):
            errors[name] = {quantity: error_of(actual[quantity], expected) for quantity, expected in exact.items()}
    return [
        {
            "case": case.name,
            "dtype": case.dtype,
            "path": path,
            "quantity": quantity,
            "unit": errors["bnext"][quantity].unit,
            "bnext": errors["bnext"][quantity].value,
            "torch": errors["torch"][quantity].value,
            "exact": case.constant and quantity in EXACT_IF_CONSTANT,
        }
        for quantity in QUANTITIES
        if quantity in exact
    ]


def measure(cases: Sequence[Case], advance: Callable[[str, int], None]) -> Results:
    """``advance`` is told the case that is next, and how many are done since."""
    rows = []
    for case in cases:
        advance(f"{case.name} {case.dtype}", 0)
        rows += rows_of(case, functions(case.epilogue))
        advance(f"{case.name} {case.dtype}", 1)
    return judged(asdict(provenance(torch.get_num_threads())), rows)
