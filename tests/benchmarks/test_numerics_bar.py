"""The bar of ``python -m benchmarks numerics`` on its own cases, but for the long ones, whose seconds `make` has."""

from __future__ import annotations

import pytest
import torch

from benchmarks.numerics import rows_of
from benchmarks.numerics_cases import CASES, LONG_SHAPE, Case
from benchmarks.numerics_report import SUM_LIMIT, judged
from benchmarks.operators import functions
from bnext.functional import batch_norm


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape != LONG_SHAPE], ids=lambda case: f"{case.name}, {case.dtype}"
)
def test_bnext_is_right_to_rounding_or_nearer_than_torch(case: Case) -> None:
    errors = judged({}, rows_of(case, functions(case.epilogue))).errors
    assert errors[~errors["holds"]].to_dict("records") == []


def test_xhat_adds_up_to_zero() -> None:
    # By a shift with more bits than the values, x - shift rounds the same way for many of them: the mean of data near
    # zero was a tenth of a rounding off, and grad_weight by that times sum(dy).
    x, weight = torch.randn(2**18, 8), torch.ones(8, requires_grad=True)
    (total,) = torch.autograd.grad(batch_norm(x, None, None, weight, None, True).sum(), weight)
    assert float(total.abs().max()) <= SUM_LIMIT * 2**9  # the norm of 2^18 numbers of size 1
