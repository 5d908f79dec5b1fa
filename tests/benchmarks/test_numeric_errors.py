"""The errors of ``python -m benchmarks numerics``: their computation, their bar, their file.

test_document.py compares the tables with the committed results.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import inf, nan
from pathlib import Path

import pandas as pd
import pytest
import torch
from canned import row as speed_row
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from benchmarks import numerics, numerics_report
from benchmarks.__main__ import main
from benchmarks.numerics import Exact, error_of
from benchmarks.numerics_cases import CASES, LONG_SHAPE, PATHS, Case, normal
from benchmarks.numerics_report import ELEMENT_LIMIT, QUANTITIES, RELATIVE, SUM_LIMIT, ULP, ULP_LIMIT, Results, judged
from benchmarks.operators import functions
from benchmarks.rows import Provenance
from bnext.functional import batch_norm

NEAR = Case("near", partial(normal, mean=3.0), shape=(4, 4, 3, 5))
CONSTANT = replace(NEAR, name="constant", make=CASES[8].make, constant=True)


def result(bnext: float, torch: float, **changes: object) -> dict[str, object]:
    fields = {"case": "c", "dtype": "float32", "path": "contiguous", "quantity": "output", "unit": RELATIVE}
    return {**fields, "bnext": bnext, "torch": torch, "exact": False, **changes}


def imagined(*rows: dict[str, object]) -> Results:
    timed = asdict(speed_row("bnext", 1.0))
    return judged({name: timed[name] for name in Provenance.__dataclass_fields__}, rows)


# Computation.


def exactly(*channels: list[float]) -> Exact:
    return Exact.of(torch.tensor(channels, dtype=torch.float64))


def of_sum(*terms: list[float]) -> Exact:
    return Exact.sum(torch.tensor(terms, dtype=torch.float64))


@pytest.mark.parametrize(
    ("actual", "exact", "error"),
    [
        # (N,C): 0.5 in a channel whose largest value is 4, and 1e5 or 1e6 in one whose largest is 1e6.
        ([[1.0, 1e6], [-4.5, 1e5]], exactly([1.0, -4.0], [1e6, 0.0]), 0.125),
        ([[1.0, 2e6], [-4.5, 1e5]], exactly([1.0, -4.0], [1e6, 0.0]), 1.0),
        # A channel of zeros has an absolute error; a subnormal one is compared with the smallest normal number.
        ([[0.0], [0.25]], exactly([0.0, 0.0]), 0.25),
        ([[0.0]], exactly([1e-40]), 1e-40 * 2.0**126),
        # A sum that cancels is compared with the norm of its terms, another sum with itself.
        ([1.0], of_sum([3.0, -3.0, 4.0, -4.0]), 50**-0.5),
        ([11.0], of_sum([1.0, 2.0, 3.0, 4.0]), 0.1),
        # NaN and inf are errors, except an infinity where the value is beyond the dtype's range.
        ([[1.0], [nan]], exactly([1.0, 2.0]), nan),
        ([[inf], [2.0]], exactly([1.0, 2.0]), inf),
        ([[inf]], exactly([1e60]), 0.0),
        ([[-inf]], exactly([1e60]), inf),
        ([[3e38]], exactly([1e60]), 1.0),
        ([[nan]], exactly([1e60]), nan),
    ],
)
def test_an_error_is_relative_to_the_largest_value_of_its_channel(actual: list, exact: Exact, error: float) -> None:
    found = error_of(torch.tensor(actual), exact)
    assert found.value == pytest.approx(error, nan_ok=True)
    assert found.unit == RELATIVE


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_data_of_16_bits_has_errors_in_ulp(dtype: torch.dtype, digits: int) -> None:
    ulp = 2.0**-digits
    exact = exactly([1.0 + ulp / 2, 16.0, 1e-6])
    actual = torch.tensor([[1.0], [16.0], [0.0]], dtype=dtype)
    error = error_of(actual, exact)
    assert (error.value, error.unit) == (0.5, ULP)
    actual[0] = 1 + 2 * ulp
    assert error_of(actual, exact).value == 1.5
    # 1e-6 lies below 1/128 of 16, where the spacing is ulp / 8.
    actual[0], actual[2] = 1.0, ulp / 4
    assert error_of(actual, exact).value == pytest.approx(2, rel=0.02)
    # A parameter's gradient has a relative error in 16 bits, too.
    assert error_of(torch.ones(1, dtype=dtype), exactly([1.0])).unit == RELATIVE


# The bar.


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        (result(1e-3, 2e-3), True),
        (result(ELEMENT_LIMIT, 0.0), True),
        (result(1.01 * ELEMENT_LIMIT, ELEMENT_LIMIT), False),
        (result(1e-6, 1e-6), False),
        (result(SUM_LIMIT, 0.0, quantity="grad_weight"), True),
        (result(SUM_LIMIT, 0.0, quantity="running_var"), False),
        (result(1.01 * SUM_LIMIT, SUM_LIMIT, quantity="grad_bias"), False),
        (result(ULP_LIMIT, 0.0, unit=ULP), True),
        (result(0.6, 0.59, unit=ULP), False),
        (result(0.0, 0.0, exact=True), True),
        (result(1e-45, 1.0, exact=True), False),
        (result(1.0, nan), True),
        (result(inf, nan), False),
        (result(nan, 0.0), False),
    ],
)
def test_the_bar(row: dict[str, object], holds: bool) -> None:
    assert imagined(row).errors["holds"].tolist() == [holds]


# Planted errors.


def broken(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A batch norm whose output is changed, and with it all its gradients."""
    return lambda *arguments: change(batch_norm(*arguments))


def one_ulp_more(y: Tensor) -> Tensor:
    """Differentiable, as not every torch's nextafter is."""
    fixed = y.detach()
    return y + (fixed.nextafter(fixed + 1) - fixed)


def failing(case: Case, bnext: Callable[..., Tensor], torchs: Callable[..., Tensor] = torch_batch_norm) -> pd.DataFrame:
    errors = judged({}, numerics.rows_of(case, {"bnext": bnext, "torch": torchs})).errors
    assert errors[["path", "quantity"]].to_numpy().tolist() == [[path, name] for path in PATHS for name in QUANTITIES]
    return errors[~errors["holds"]]


def biased(x: Tensor, mean: Tensor, var: Tensor, *rest: object) -> Tensor:
    output = batch_norm(x, mean, var, *rest)
    count = x.numel() // x.shape[1]
    var.mul_((count - 1) / count)
    return output


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (broken(lambda y: y * (1 + 1e-5)), {"output", "grad_input", "grad_weight", "grad_bias"}),
        (broken(lambda y: y + 1e-4), {"output"}),
        # grad_output reaches the wrong images, so its sum, grad_bias, is right.
        (broken(lambda y: torch.cat([y[:-1], y[:1]])), {"output", "grad_input", "grad_weight"}),
        (biased, {"running_var"}),
    ],
    ids=["scaled", "moved", "last image", "biased"],
)
def test_planted_errors_fail_the_bar(wrong: Callable[..., Tensor], found: set[str]) -> None:
    missed = failing(NEAR, wrong)
    for path in PATHS:
        assert set(missed.loc[missed["path"] == path, "quantity"]) == found, path


def test_a_constant_channel_has_to_be_exact() -> None:
    assert "output" in set(failing(CONSTANT, broken(one_ulp_more))["quantity"])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape != LONG_SHAPE], ids=lambda case: f"{case.name}, {case.dtype}"
)
def test_bnext_is_right_to_rounding_or_nearer_than_torch(case: Case) -> None:
    """This checks the float64 results as well: a fault there would look like an error of bnext."""
    errors = judged({}, numerics.rows_of(case, functions(case.epilogue))).errors
    assert errors[~errors["holds"]].to_dict("records") == []


def test_xhat_adds_up_to_zero() -> None:
    # With a shift that has more bits than the values, x - shift rounds the same way for many of them. The mean of data
    # near zero was off by a tenth of a rounding, and grad_weight by that times sum(dy).
    x, weight = torch.randn(2**18, 8), torch.ones(8, requires_grad=True)
    (total,) = torch.autograd.grad(batch_norm(x, None, None, weight, None, True).sum(), weight)
    assert float(total.abs().max()) <= SUM_LIMIT * 2**9  # the norm of 2^18 numbers of size 1


# The file, the tables, the command.


def test_results_survive_the_file_to_three_digits(tmp_path: Path) -> None:
    path = tmp_path / "numerics.json"
    results = imagined(result(1.23456e-7, nan), result(0.0, inf, dtype="float16", unit=ULP))
    numerics_report.save_results(path, results)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    kept = numerics_report.load_results(path)
    assert kept.machine == results.machine
    pd.testing.assert_frame_equal(kept.errors, results.errors)
    assert kept.errors["bnext"].tolist() == [1.23e-7, 0.0]
    lines = numerics_report.line_a_case(kept.errors).cells.to_numpy().tolist()
    assert [line[2:4] for line in lines] == [["1.2e-07", "NaN"], ["0.00 ulp", "inf"]]


@pytest.mark.parametrize("right", [True, False])
def test_command_writes_file_and_page_prints_the_table_and_names_what_fails(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = batch_norm if right else broken(lambda y: y + 1e-4)
    monkeypatch.setattr("benchmarks.numerics_cases.CASES", (NEAR,))
    monkeypatch.setattr(numerics, "functions", lambda epilogue: {"bnext": ours, "torch": torch_batch_norm})
    assert main(["numerics", "--output", str(tmp_path)]) == (0 if right else 1)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"{15 if right else 12} of 15 hold."
    for path, line in zip([] if right else PATHS, printed.err.splitlines(), strict=True):
        assert line.startswith(f"python -m benchmarks: error: near, float32, {path}, output: bnext ")
    assert "…" not in printed.out, "a number was cut"
    for part in (*PATHS, *QUANTITIES, "near", "Error: ", "Bar: "):
        assert part in printed.out, part
    file = tmp_path / "numerics.json"
    assert file.with_suffix(".md").read_text() == numerics_report.page(numerics_report.load_results(file))
    assert main(["report", str(file)]) == (0 if right else 1)
    assert printed.out.endswith(capsys.readouterr().out)  # before it the progress bar ended its line
