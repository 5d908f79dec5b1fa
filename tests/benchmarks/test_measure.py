"""python -m benchmarks from the command line to its files, on the smallest shapes, the CPU also in a GPU's place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import HostRuntime
from torch import Tensor

from benchmarks import measure, providers, timing
from benchmarks.__main__ import main
from benchmarks.check import MismatchError
from benchmarks.cuda import device, rotation
from benchmarks.cuda import measure as cuda
from benchmarks.float64 import Checker
from benchmarks.measure import Host, Outcome, case_work
from benchmarks.providers import Provider, eager
from benchmarks.rows import Row, load_rows
from benchmarks.suites import (
    BN_ADD_RELU,
    BN_RELU,
    CUDA_SUITES,
    SUITES,
    TENSOR_PASSES,
    Suite,
    model_bytes,
    select_cases,
)
from benchmarks.touched import is_touched
from bnext import _C

PLAIN = Suite(((2, 3, 4, 4), (4, 8)), tuple(TENSOR_PASSES), compiled=((2, 3, 4, 4), (4, 8)))
FUSED = Suite(
    operations=tuple(TENSOR_PASSES),
    compiled=((2, 3, 4, 4),),
    compiled_dtypes=("float32", "bfloat16"),
    fused=((BN_RELU, ((2, 3, 4, 4),)), (BN_ADD_RELU, ((2, 3, 4, 4),))),
    seconds=5,
)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for suites in (SUITES, CUDA_SUITES):
        monkeypatch.setitem(suites, "tiny", PLAIN)
        monkeypatch.setitem(suites, "tiny-fused", FUSED)
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(cuda, "CudaRuntime", HostRuntime)
    # What the calls take does not matter here: few of them.
    monkeypatch.setattr(rotation, "MAX_GRAPH_CALLS", 4)
    monkeypatch.setattr(timing, "MIN_ROUND_S", 1e-5)
    monkeypatch.setattr(measure, "WARM_BYTES", 1)
    monkeypatch.setattr(providers, "compiled", providers.out_of_place)


DEVICES = {"cpu": {"clock"}, "cuda": {"graph", "eager"}}
OURS = {"cpu": set(), "cuda": {"torch-no-cudnn"}}
ONE = ("--dtype", "float32", "--layout", "contiguous")


def run(output: Path, suite: str, *options: str) -> int:
    return main(["--suite", suite, "--rounds", "1", "--threads", "1", "--output", str(output), *options])


def rows_in(output: Path) -> list[Row]:
    return load_rows(output / "results.json")


@pytest.mark.parametrize("suite", [PLAIN, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("name", DEVICES)
def test_run_leaves_rows_of_every_provider_tables_and_picture(
    name: str, suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, threads = tmp_path / "new" / "folder", torch.get_num_threads()
    chosen = "tiny-fused" if suite is FUSED else "tiny"
    assert run(output, chosen, "--device", name, "--dtype", "float32,bfloat16") == 0
    rows = rows_in(output)
    keys = {(row.shape, row.epilogue, row.dtype, row.layout, row.op, row.mode, row.provider) for row in rows}
    assert len(keys) == len(rows)
    assert {(row.op, row.mode) for row in rows} == {(op, mode) for op in TENSOR_PASSES for mode in DEVICES[name]}
    everywhere = {"torch", "bnext", "copy", *OURS[name]}
    compiled = suite.compiled_dtypes
    for dtype in ("float32", "bfloat16"):
        expected = everywhere | ({"torch-compile"} if dtype in compiled else set())
        assert {row.provider for row in rows if row.dtype == dtype} == expected
    for row in rows:
        assert (row.device, row.rounds, row.threads) == (name, 1, 1)
        assert row.bytes == model_bytes(row.op, row.shape, row.dtype, row.epilogue)
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9)
        assert (row.held_bytes is not None) == (suite is FUSED and row.op == "forward" and row.provider != "copy")
        assert row.plan == ("cluster of 8, read once" if (name, row.provider) == ("cuda", "bnext") else "")
        assert row.buffer_sets == (3 * 500 // row.bytes + 1 if name == "cuda" else 1), (
            "three times a cache of 500 bytes"
        )
    assert sorted(path.name for path in output.iterdir()) == ["results.json", "results.png"]
    printed = capsys.readouterr()
    assert "2x3x4x4" in printed.out
    assert not printed.err
    assert torch.get_num_threads() == threads


def test_without_compile_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", None)
    assert run(tmp_path, "tiny-fused", "--no-compile", "--op", "eval") == 0


def wrong(*args: Any) -> Tensor:
    return torch.nn.functional.batch_norm(*args) * 1.01


def raising(*args: Any) -> Tensor:
    raise ValueError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("function", "message"),
    [(wrong, "output of bnext is not float64's"), (raising, "bnext failed: ValueError: no kernel")],
)
@pytest.mark.parametrize("name", DEVICES)
def test_bnext_wrong_or_failing_is_an_error_and_not_a_number(
    name: str, function: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "bnext", function)
    monkeypatch.setattr(providers, "fused", lambda epilogue: lambda *args: eager(epilogue)(*args) * 1.01)
    assert run(tmp_path, "tiny", "--device", name, *ONE) == 1
    assert not list(tmp_path.iterdir())
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(PLAIN.shapes)
    assert all(message in error for error in errors)
    assert run(tmp_path, "tiny-fused", *ONE) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("provider", ["torch", "torch-no-cudnn"])
def test_torch_further_from_float64_is_timed_with_a_note(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Checker.check

    def check(self: Checker, made: Provider) -> None:
        if made.name == provider:
            raise MismatchError("inaccurate")
        original(self, made)

    monkeypatch.setattr(Checker, "check", check)
    assert run(tmp_path, "tiny", "--device", "cuda", *ONE) == 0
    assert capsys.readouterr().err.splitlines() == ["python -m benchmarks: note: inaccurate"] * 2
    assert provider in {row.provider for row in rows_in(tmp_path)}


@pytest.mark.parametrize("made", [wrong, raising, None], ids=["wrong", "raising", "no compiler"])
def test_torch_compile_wrong_or_failing_is_left_out_with_a_note(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(providers, "compiled", lambda _: made if made else raising())
    assert run(tmp_path, "tiny", "--dtype", "bfloat16", "--layout", "contiguous") == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("note: tiny " in error and "torch-compile" in error for error in errors)
    assert {row.provider for row in rows_in(tmp_path)} == {"torch", "bnext", "copy"}


def failing_in(operation: str, error: BaseException) -> Callable[..., Any]:
    original = measure.provider_call

    def make(chosen: str, *args: Any) -> Any:
        if chosen == operation:
            raise error
        return original(chosen, *args)

    return make


def test_bnext_failing_in_one_operation_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "provider_call", failing_in("backward", MemoryError("out of memory")))
    assert run(tmp_path, "tiny", *ONE) == 1
    assert {row.op for row in rows_in(tmp_path)} == set(TENSOR_PASSES) - {"backward"}


def test_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "provider_call", failing_in("backward", KeyboardInterrupt()))
    assert run(tmp_path, "tiny") == 130
    assert {row.op for row in rows_in(tmp_path)} == {"forward"}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert "measured so far" in capsys.readouterr().err


def test_the_progress_bar_ends_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "bnext", wrong)
    cases = select_cases(["tiny", "tiny-fused"], ["float32"], ["contiguous"])
    for chosen in (Host(with_compile=True), cuda.Gpu(with_compile=True)):
        outcome, finished = Outcome(), []
        measure.measure(cases, chosen, outcome, lambda _, work, f=finished: f.append(work), 1.0, rounds=1, threads=1)
        assert outcome.mismatches
        assert outcome.rows
        assert sum(finished) == sum(case_work(chosen, case) for case in cases)


def test_large_tensors_are_timed_in_graphs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EAGER_MAX_BYTES", 200)
    assert run(tmp_path, "tiny", "--device", "cuda", *ONE) == 0
    modes = {(row.shape, row.mode) for row in rows_in(tmp_path)}
    assert modes == {((2, 3, 4, 4), "graph"), ((4, 8), "graph"), ((4, 8), "eager")}


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "CudaRuntime", lambda: HostRuntime(captures=False))
    assert run(tmp_path, "tiny", "--device", "cuda", *ONE) == 0
    reason = "eager, not captured: RuntimeError: operation not permitted when stream is capturing"
    assert {(row.mode, row.note) for row in rows_in(tmp_path)} == {("graph", reason), ("eager", "")}


def test_plans_for_lesser_devices_are_timed_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[dict[str, int]] = []
    monkeypatch.setattr(_C, "cap_cuda_device", lambda **cap: caps.append(cap))
    assert run(tmp_path, "tiny", "--device", "cuda", "--plans", *ONE) == 0
    planned = {row.provider for row in rows_in(tmp_path) if row.provider.startswith("bnext-")}
    assert planned == {"bnext-clusters-of-8", "bnext-no-clusters", "bnext-half-memory"}
    # Each cap is lifted before anything else is called.
    assert caps[1::2] == [{}] * (len(caps) // 2)
    assert {tuple(cap) for cap in caps[::2]} == {("max_cluster",), ("shared_per_block",)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "resnet51"], "resnet51"),
        (["--dtype", "float32,int8"], "int8"),
        (["--op", "sideways"], "sideways"),
        (["--threads", "0"], "positive whole number"),
        (["--rounds", "2.5"], "positive whole number"),
        (["--budget", "nan"], "positive number"),
        (["--rounds", "3", "--budget", "5"], "not allowed with"),
        (["--suite", "2d", "--layout", "channels_last"], "nothing to measure"),
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda", "--suite", "large"], "'large' is not one of cuda's"),
        (["--suite", "resnet50-256"], "'resnet50-256' is not one of cpu's"),
        (["--plans"], "--plans"),
        (["--touched", "--device", "cuda"], "--touched"),
        (["--suite", "tiny", "--output", __file__], "cannot make the folder"),
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["report"], "FILE.json"),
    ],
    ids=" ".join,
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


def test_a_package_that_is_missing_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", None)
    assert run(tmp_path, "tiny", *ONE) == 2
    error = capsys.readouterr().err
    assert error.endswith("(the extra bench has what is needed)\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing was measured"


def test_without_cuda_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "missing", lambda: "it is not here")
    for suite in ("tiny", "training"):
        assert run(tmp_path, suite, "--device", "cuda") == 2
        assert capsys.readouterr().err == "python -m benchmarks: error: cannot measure on cuda: it is not here\n"


def test_touched_run_is_one_in_an_environment_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--touched", "--suite", "2d", "--quick", "--rounds", "1"]
    command += ["--dtype", "float32", "--op", "eval", "--no-compile", "--output", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert all(is_touched(row.environment) for row in rows_in(tmp_path))
