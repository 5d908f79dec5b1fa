"""python -m benchmarks from the command line to its files, on the smallest shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import measure, operations, providers
from benchmarks.__main__ import main
from benchmarks.check import describe_difference
from benchmarks.operations import make_tensors, operation_calls
from benchmarks.providers import Provider, functions
from benchmarks.rows import Row, load_rows
from benchmarks.suites import (
    BN_ADD_RELU,
    BN_RELU,
    ITEM_BYTES,
    LAYOUTS,
    PLAIN,
    SUITES,
    TENSOR_PASSES,
    Case,
    Epilogue,
    Suite,
)
from benchmarks.touched import is_touched


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "tiny", Suite(((2, 3, 4, 4), (4, 8)), tuple(TENSOR_PASSES)))


def wrong_batch_norm(*args: object) -> Tensor:
    return torch.nn.functional.batch_norm(*args) * 1.01  # type: ignore[arg-type]


def test_run_leaves_rows_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "folder"
    threads = torch.get_num_threads()
    command = ["--suite", "tiny", "--dtype", "float32,bfloat16", "--rounds", "2", "--threads", "1"]
    assert main([*command, "--output", str(output)]) == 0
    rows = load_rows(output / "results.json")
    providers, tensors_a_dtype = 3, 3  # (N,C,H,W) in two layouts, (N,C) in one
    assert len(rows) == 2 * tensors_a_dtype * len(TENSOR_PASSES) * providers
    assert {row.provider for row in rows} == {"torch", "bnext", "copy"}
    assert {(row.rounds, row.threads) for row in rows} == {(2, 1)}
    assert all(row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9) for row in rows)
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "results.png"]
    assert "2x3x4x4" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "resnet51"], "resnet51"),
        (["--dtype", "float32,int8"], "int8"),
        (["--layout", "nhwc"], "nhwc"),
        (["--op", "sideways"], "sideways"),
        (["--threads", "0"], "positive whole number"),
        (["--rounds", "2.5"], "positive whole number"),
        (["--budget", "nan"], "positive number"),
        (["--rounds", "3", "--budget", "5"], "not allowed with"),
        (["--suite", "2d", "--layout", "channels_last"], "nothing to measure"),
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["report"], "FILE.json"),
    ],
)
def test_bad_argument_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse's way of ending
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_output_that_is_a_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.touch()
    assert main(["--suite", "tiny", "--output", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = measure.time_operation

    def interrupted(operation: str, *args: object) -> list[Row]:
        if operation == "backward":
            raise KeyboardInterrupt
        return original(operation, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "time_operation", interrupted)
    assert main(["--suite", "tiny", "--rounds", "1", "--output", str(tmp_path)]) == 130
    assert {row.op for row in load_rows(tmp_path / "results.json")} == {"forward"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "measured so far" in capsys.readouterr().err


def test_wrong_result_is_an_error_and_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "bnext", wrong_batch_norm)
    command = ["--suite", "tiny", "--dtype", "float32", "--layout", "contiguous", "--rounds", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("output of bnext is not torch's" in error for error in errors)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bnext_passes_its_own_check(dtype: str, layout: str) -> None:
    case = Case("tiny", (8, 16, 12, 12), dtype, layout, ("forward",))
    tensors = make_tensors(case)
    assert tensors.input.is_contiguous(memory_format=operations.MEMORY_FORMATS[layout])
    measure.make_checker(case, tensors).check(Provider("bnext", providers.PROVIDERS["bnext"]))


@pytest.mark.parametrize(
    ("actual", "agrees"),
    [
        (torch.full((4, 3), 1.0 + 1e-7), True),
        (torch.full((4, 3), 1.1), False),
        (torch.full((4, 3), torch.nan), False),
        (torch.ones(4, 3, dtype=torch.float64), False),
        (torch.ones(3, 4).t(), False),
        (torch.ones(4, 4), False),
    ],
)
def test_difference_in_value_dtype_stride_or_shape_is_described(actual: Tensor, agrees: bool) -> None:
    difference = describe_difference(actual, torch.ones(4, 3), 1e-6, 1e-6)
    assert (difference is None) == agrees
    assert "\n" not in (difference or "")


@pytest.mark.parametrize("operation", TENSOR_PASSES)
@pytest.mark.parametrize("epilogue", [PLAIN, BN_RELU, BN_ADD_RELU], ids=str)
def test_calls_return_fresh_results_and_the_floor_does_not(operation: str, epilogue: Epilogue) -> None:
    case = Case("tiny", (4, 8), "float32", "contiguous", (operation,), epilogue)
    calls = operation_calls(operation, make_tensors(case), functions(epilogue))

    def address(result: object) -> int:
        tensor = result[0] if isinstance(result, tuple) else result
        assert isinstance(tensor, Tensor)
        return tensor.data_ptr()

    for provider, call in calls.items():
        first, second = call(), call()
        assert (address(first) == address(second)) == (provider == "copy"), provider


def test_touched_run_is_one_in_an_environment_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--touched", "--suite", "2d", "--quick", "--rounds", "1"]
    command += ["--dtype", "float32", "--op", "eval", "--no-compile", "--output", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert all(is_touched(row.environment) for row in load_rows(tmp_path / "results.json"))


def test_plans_are_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plans"]) == 2
    assert "--plans" in capsys.readouterr().err


def test_touched_is_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--touched", "--device", "cuda"]) == 2
    assert "--touched" in capsys.readouterr().err
