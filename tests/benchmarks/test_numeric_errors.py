"""The errors of ``python -m benchmarks numerics``: how they are computed, what the bar makes of them, how they look."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import inf, isnan, nan
from pathlib import Path

import pandas as pd
import pytest
import reference
import torch
from canned import row as speed_row
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm

from benchmarks import numerics
from benchmarks.__main__ import main
from benchmarks.numerics import Exact, error_of, exact_results
from benchmarks.numerics_cases import CASES, KINK, LONG_SHAPE, PATHS, Case, by_channel, in_path, make_arguments, normal
from benchmarks.numerics_report import (
    ELEMENT_LIMIT,
    QUANTITIES,
    RELATIVE,
    SUM_LIMIT,
    ULP,
    ULP_LIMIT,
    Results,
    block,
    judged,
    line_a_case,
    load_results,
    page,
    save_results,
)
from benchmarks.operators import functions
from benchmarks.rows import InputError, Provenance
from benchmarks.suites import Epilogue
from bnext.functional import batch_norm

SMALL = (4, 4, 3, 5)
NEAR = Case("near", partial(normal, mean=3.0), shape=SMALL)

# A case of each kind.
KINDS = [
    NEAR,
    replace(NEAR, name="eval", training=False),
    replace(NEAR, name="16 bits", dtype="bfloat16"),
    replace(NEAR, name="fused", epilogue=Epilogue("relu", True)),
    CONSTANT := replace(NEAR, name="constant", make=CASES[8].make, constant=True),
]


def result(bnext: float, torch: float, **changes: object) -> dict[str, object]:
    fields = {"case": "c", "dtype": "float32", "path": "contiguous", "quantity": "output", "unit": RELATIVE}
    return {**fields, "bnext": bnext, "torch": torch, "exact": False, **changes}


def imagined(*rows: dict[str, object]) -> Results:
    timed = asdict(speed_row("bnext", 1.0))
    return judged({name: timed[name] for name in Provenance.__dataclass_fields__}, rows)


IMAGINED = imagined(
    result(1e-7, 2e-3),
    result(2e-7, 1e-3, path="channels_last"),
    result(1e-8, inf, quantity="grad_input"),
    result(0.0, nan, quantity="grad_weight"),
    result(0.5, 0.625, dtype="float16", unit=ULP),
    result(0.0, 4.0, case="constant", exact=True),
)


# Computation.


def test_an_error_is_in_sizes_of_its_channel() -> None:
    exact = Exact.of(torch.tensor([[1.0, -4.0], [1e6, 0.0]], dtype=torch.float64))
    actual = torch.tensor([[1.0, 1e6], [-4.5, 1e5]])  # (N,C): 0.5 of 4, and 1e5 of 1e6
    assert error_of(actual, exact).value == pytest.approx(0.125)
    actual[0, 1] = 2e6
    assert error_of(actual, exact).value == pytest.approx(1.0)
    assert error_of(actual, exact).unit == RELATIVE


def test_a_channel_of_zeros_has_an_absolute_error() -> None:
    exact = Exact.of(torch.zeros(1, 2, dtype=torch.float64))
    assert error_of(torch.tensor([[0.0], [0.25]]), exact).value == 0.25
    assert error_of(torch.zeros(2, 1), exact).value == 0


def test_below_the_normal_numbers_an_error_is_in_sizes_of_the_smallest() -> None:
    exact = Exact.of(torch.tensor([[1e-40]], dtype=torch.float64))
    assert error_of(torch.tensor([1e-40]), exact).value < 2**-24
    assert error_of(torch.tensor([0.0]), exact).value == pytest.approx(1e-40 * 2.0**126)


def test_a_sum_that_cancels_is_compared_with_the_norm_of_its_terms() -> None:
    terms = torch.tensor([[3.0, -3.0, 4.0, -4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    exact = Exact.sum(terms)
    assert exact.values.flatten().tolist() == [0, 10]
    assert exact.size.flatten().tolist() == pytest.approx([50**0.5, 10])
    assert error_of(torch.tensor([1.0, 10.0]), exact).value == pytest.approx(50**-0.5)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_data_of_16_bits_is_measured_in_its_own_spacing(dtype: torch.dtype, digits: int) -> None:
    ulp = 2.0**-digits
    exact = Exact.of(torch.tensor([[1.0 + ulp / 2, 16.0, 1e-6]], dtype=torch.float64))
    actual = torch.tensor([[1.0], [16.0], [0.0]], dtype=dtype)
    error = error_of(actual, exact)
    assert (error.value, error.unit) == (0.5, ULP)
    actual[0] = 1 + 2 * ulp
    assert error_of(actual, exact).value == 1.5
    # 1e-6 lies below 1/128 of 16, where the spacing is ulp / 8.
    actual[0], actual[2] = 1.0, ulp / 4
    assert error_of(actual, exact).value == pytest.approx(2, rel=0.02)
    # A parameter's gradient of 16 bits would be measured as others are.
    assert error_of(torch.ones(1, dtype=dtype), Exact.of(torch.ones(1, 1, dtype=torch.float64))).unit == RELATIVE


def test_nan_and_infinity_are_errors_unless_the_dtype_holds_no_more() -> None:
    exact = Exact.of(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    assert isnan(error_of(torch.tensor([[1.0], [nan]]), exact).value)
    assert error_of(torch.tensor([[inf], [2.0]]), exact).value == inf
    huge = Exact.of(torch.tensor([[1e60]], dtype=torch.float64))
    assert error_of(torch.tensor([inf]), huge).value == 0
    assert error_of(torch.tensor([-inf]), huge).value > 0
    assert error_of(torch.tensor([3e38]), huge).value > 0
    assert isnan(error_of(torch.tensor([nan]), huge).value)


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_exact_results_are_those_of_the_reference(case: Case) -> None:
    exact, a = exact_results(case, make_arguments(case))
    frozen = {} if case.training else {"running_mean": a.running_mean, "running_var": a.running_var}
    residual, act = (a.residual[0], "relu") if case.epilogue.residual else (None, None)
    fwd = reference.forward(a.input, a.weight, a.bias, eps=case.eps, **frozen, residual=residual, act=act)
    grads = reference.backward(a.grad_output, fwd, a.weight, training=case.training, act=act)
    expected = {
        "output": by_channel(fwd.output),
        "grad_input": by_channel(grads.input),
        "grad_weight": grads.weight[:, None],
        "grad_bias": grads.bias[:, None],
    }
    if case.training:
        unbiased = reference.updated_running_stats(a.running_mean, a.running_var, fwd, 1.0)[1]
        expected["running_var"] = unbiased[:, None]
    assert exact.keys() == expected.keys()
    for quantity, values in expected.items():
        torch.testing.assert_close(exact[quantity].values, values, rtol=1e-12, atol=1e-12, msg=quantity)
    assert (residual is None) or (a.grad_output[fwd.z.abs() < KINK] == 0).all()


def test_every_path_has_the_same_values_in_the_same_order() -> None:
    values = torch.arange(4 * 3 * 2 * 5.0).view(4, 3, 2, 5)
    for path in PATHS:
        assert torch.equal(by_channel(in_path(values, path)), by_channel(values)), path
    assert in_path(values, "channels_last").is_contiguous(memory_format=torch.channels_last)
    assert in_path(values, "(N,C)").shape == (40, 3)


def test_arguments_are_the_same_at_every_call_and_others_for_each_case() -> None:
    first, again, other = (make_arguments(case) for case in (NEAR, NEAR, replace(NEAR, name="other")))
    assert torch.equal(first.input, again.input)
    assert torch.equal(first.grad_output, again.grad_output)
    assert not torch.equal(first.grad_output, other.grad_output)
    keys = [(case.name, case.dtype) for case in CASES]
    assert len(set(keys)) == len(keys)


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
        (result(1.0, inf), True),
        (result(nan, nan), False),
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
        (broken(lambda y: torch.where(y == y.amax(), nan, y)), set(QUANTITIES) - {"running_var"}),
        (broken(lambda y: y.bfloat16().float()), {"output", "grad_input", "grad_weight", "grad_bias"}),
        # Only from where its gradient came is wrong, so that its sum is right.
        (broken(lambda y: torch.cat([y[:-1], y[:1]])), {"output", "grad_input", "grad_weight"}),
        (biased, {"running_var"}),
    ],
    ids=["scaled", "moved", "nan", "rounded", "last image", "biased"],
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
    errors = judged({}, numerics.rows_of(case, functions(case.epilogue))).errors
    assert errors[~errors["holds"]].to_dict("records") == []


def test_xhat_adds_up_to_zero() -> None:
    # By a shift with more bits than the values, x - shift rounds the same way for many of them: the mean of data near
    # zero was a tenth of a rounding off, and grad_weight by that times sum(dy).
    x, weight = torch.randn(2**18, 8), torch.ones(8, requires_grad=True)
    (total,) = torch.autograd.grad(batch_norm(x, None, None, weight, None, True).sum(), weight)
    assert float(total.abs().max()) <= SUM_LIMIT * 2**9  # the norm of 2^18 numbers of size 1


# The file, the tables, the command.


def test_results_survive_the_file_to_three_digits(tmp_path: Path) -> None:
    path = tmp_path / "numerics.json"
    results = imagined(result(1.23456e-7, nan), result(0.0, inf, dtype="float16", unit=ULP))
    save_results(path, results)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    kept = load_results(path)
    assert kept.machine == results.machine
    pd.testing.assert_frame_equal(kept.errors, results.errors)
    assert kept.errors["bnext"].tolist() == [1.23e-7, 0.0]


@pytest.mark.parametrize(
    "content",
    [
        '{"numerics": []}',
        '{"numerics": [], "machine": {}}',
        '{"numerics": [{"case": 1}], "machine": {}}',
        json.dumps({"machine": {}, "numerics": [result(1.0, 1.0, quantity="loss")]}),
    ],
    ids=["no machine", "no rows", "other rows", "other quantity"],
)
def test_foreign_file_is_one_line_and_status_2(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.json"
    path.write_text(content)
    assert main(["report", str(path)]) == 2
    said = capsys.readouterr().err
    assert "foreign.json holds no results of numerics" in said
    assert said.count("\n") == 1
    with pytest.raises(InputError):
        load_results(path)


def test_block_has_the_worst_of_each_case() -> None:
    assert line_a_case(IMAGINED.errors).cells.to_numpy().tolist() == [
        ["c", "float32", "2.0e-07", "2.0e-03", "1.0e-08", "inf", "0", "NaN", "4 of 4"],
        ["c", "float16", "0.50 ulp", "0.62 ulp", "", "", "", "", "1 of 1"],
        ["constant", "float32", "0", "4", "", "", "", "", "1 of 1"],
    ]
    assert "6 of 6 hold." in block(IMAGINED)
    assert "Imagined CPU (avx2), 2 threads" in block(IMAGINED)
    lost = imagined(result(1e-7, nan), result(nan, 1e-3), result(1e-7, 1e-3))
    assert line_a_case(lost.errors).cells.to_numpy().tolist() == [
        ["c", "float32", "NaN", "NaN", "", "", "", "", "2 of 3"]
    ]


def run_on(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bnext: Callable[..., Tensor]) -> int:
    monkeypatch.setattr("benchmarks.numerics_cases.CASES", (case,))
    monkeypatch.setattr(numerics, "functions", lambda epilogue: {"bnext": bnext, "torch": torch_batch_norm})
    return main(["numerics", "--output", str(tmp_path)])


def test_command_prints_the_table_and_writes_file_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(NEAR, tmp_path, monkeypatch, batch_norm) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "15 of 15 hold."
    assert printed.err == ""
    assert "…" not in printed.out, "a number was cut"
    for part in (*PATHS, *QUANTITIES, "near", "Error: ", "Bar: "):
        assert part in printed.out, part
    assert len(load_results(tmp_path / "numerics.json").errors) == 15
    assert (tmp_path / "numerics.md").read_text() == page(load_results(tmp_path / "numerics.json"))
    assert main(["report", str(tmp_path / "numerics.json")]) == 0
    assert printed.out.endswith(capsys.readouterr().out)  # before it the progress bar ended its line


def test_command_names_what_fails_and_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(NEAR, tmp_path, monkeypatch, broken(lambda y: y + 1e-4)) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "12 of 15 hold."
    named = printed.err.splitlines()
    assert len(named) == 3
    for path, line in zip(PATHS, named, strict=True):
        assert line.startswith(f"python -m benchmarks: error: near, float32, {path}, output: bnext ")
    assert main(["report", str(tmp_path / "numerics.json")]) == 1
