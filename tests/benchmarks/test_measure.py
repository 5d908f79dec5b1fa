"""``python -m benchmarks`` from the command line to its files, on the smallest shapes; the CPU stands in for a GPU."""

import signal
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from host_gpu import HostGpu
from tiny_suites import FIVE, FUSED, PLAIN, SHAPE, TINY, Run, spoil
from torch import Tensor, nn

from benchmarks import measure, models, operators, training
from benchmarks.__main__ import main
from benchmarks.correctness import MismatchError
from benchmarks.cuda import device
from benchmarks.cuda import measure as cuda
from benchmarks.measure import Device, Outcome, total_work
from benchmarks.operators import eager
from benchmarks.rows import is_touched, load_rows
from benchmarks.suites import CHECKPOINT, EAGER_PROVIDERS, RECOMPUTE, WITHOUT, Case, Suite, select_cases
from benchmarks.traffic import TENSOR_PASSES, WALKS, model_bytes
from benchmarks.trainer_process import ProcessError, TrainerProcess
from benchmarks.training import STEPS
from benchmarks.walk import Walked
from bnext import _C

MODES = {"cpu": {"clock"}, "cuda": {"graph", "eager"}}
OURS: dict[str, set[str]] = {"cpu": set(), "cuda": {"torch-no-cudnn"}}
ONE = ("--dtype", "float32", "--layout", "contiguous")


# The rows of a run.


@pytest.mark.parametrize(("name", "suite"), [("tiny", PLAIN), ("tiny-fused", FUSED)])
@pytest.mark.parametrize("on", MODES)
def test_batch_norms_leave_rows_of_every_provider_and_a_picture(
    on: str, name: str, suite: Suite, run: Run, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    status, rows, errors = run(name, "--device", on, "--dtype", "float32,bfloat16")
    assert (status, errors) == (0, [])
    keys = {(row.shape, row.epilogue, row.dtype, row.layout, row.op, row.mode, row.provider) for row in rows}
    assert len(keys) == len(rows)
    assert {(row.op, row.mode) for row in rows} == set(product(TENSOR_PASSES, MODES[on]))
    for dtype in ("float32", "bfloat16"):
        expected = {"torch", "bnext", "copy", *OURS[on]}
        expected |= {"torch-compile"} if dtype in suite.compiled_dtypes else set()
        assert {row.provider for row in rows if row.dtype == dtype} == expected
    for row in rows:
        assert (row.device, row.rounds, row.threads, row.model) == (on, 1, 1, "")
        assert row.bytes == model_bytes(row.op, row.shape, row.dtype, row.epilogue)
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9)
        assert (row.held_bytes is not None) == (suite is FUSED and row.op == "forward" and row.provider != "copy")
        assert row.plan == ("cluster of 8, read once" if (on, row.provider) == ("cuda", "bnext") else "")
        # Three times a cache of 500 bytes.
        assert row.buffer_sets == (3 * 500 // row.bytes + 1 if on == "cuda" else 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]
    assert torch.get_num_threads() == threads


def test_models_leave_rows_of_every_provider(run: Run, tmp_path: Path) -> None:
    status, rows, errors = run("training,models,compiled")
    assert (status, errors) == (0, [])
    found = [(row.suite, row.model, row.dtype, row.layout, row.op, row.provider) for row in rows]
    assert set(found) == {
        (name, input.model, dtype, layout, op, provider)
        for name, suite in TINY.items()
        for input in suite.inputs
        if input.model and name not in ("walk", "memory")
        for dtype, layout, op, provider in product(suite.dtypes, suite.layouts, suite.operations, suite.providers)
    }
    assert len(set(found)) == len(found)
    for row in rows:
        assert (row.rounds, row.threads, row.bytes) == (1, 1, 0)
        assert row.peak_bytes == (5_000_000 if row.suite == "training" else None)
        assert (row.page_faults is not None) == (row.op == "step")
        assert bool(row.shares) == (row.suite == "training")
        assert len(row.losses) == (STEPS + 1 if row.op == "step" and row.provider != WITHOUT else 0)
        if row.suite == "training":
            assert row.losses == pytest.approx(rows[0].losses, rel=1e-4)
    assert rows[0].losses[0] > 1.005 * rows[0].losses[STEPS - 1], "it learns"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


def test_memory_of_a_step(run: Run) -> None:
    status, rows, errors = run("memory")
    assert (status, errors) == (0, [])
    found = {row.provider: row for row in rows}
    assert list(found) == [*EAGER_PROVIDERS, RECOMPUTE, CHECKPOINT]
    for row in rows:
        assert row.held_bytes < row.allocated_bytes
        assert 0.5 < SHAPE[0] * row.image_bytes / row.allocated_bytes < 2
        assert not row.shares
    held = {name: row.held_bytes for name, row in found.items()}
    assert held["torch"] > held["bnext-fused"] > held[RECOMPUTE]
    assert held[CHECKPOINT] == held["torch"], "the tiny model has no two blocks of a kind"


def test_a_walk_is_timed_beside_a_copy(run: Run) -> None:
    status, rows, errors = run("walk", "--layout", "channels_last")
    assert (status, errors) == (0, [])
    assert [(row.op, row.provider) for row in rows] == list(product(WALKS, ("torch", "bnext", "copy")))
    norms = [(4, 16, 8, 8), (4, 4, 8, 8), (4, 4, 8, 8), (4, 16, 8, 8)]
    moved = {op: sum(model_bytes(single, shape, "float32") for shape in norms) for op, single in WALKS.items()}
    assert {row.op: row.bytes for row in rows} == moved


def test_a_walk_keeps_its_results_to_its_end() -> None:
    alive: list[int] = []
    seen: list[int] = []

    class Result:
        def __init__(self) -> None:
            alive.append(1)
            seen.append(len(alive))

        def __del__(self) -> None:
            alive.pop()

    prepared: list[int] = []
    walked = Walked([Result] * 3, [lambda: prepared.append(len(alive))] * 3)
    assert walked.timeit(2) > 0
    assert (seen, prepared, alive) == ([1, 2, 3] * 3, [0, 1, 2] * 3, []), "one is not timed"


def test_models_on_a_gpu_are_called_from_python(run: Run) -> None:
    options = ("--device", "cuda", "--dtype", "bfloat16", "--layout", "channels_last")
    _, rows, _ = run("training,compiled", *options)
    assert {row.suite for row in rows} == {"training", "compiled"}
    assert {(row.device, row.mode) for row in rows} == {("cuda", "eager")}
    assert [row.provider for row in rows if row.suite == "training"] == list(FIVE)


def test_a_suite_has_its_own_number_of_threads(run: Run) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        _, rows, _ = run("tiny,models", *ONE, "--op", "eval,step", threads=None)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {(row.suite, row.threads) for row in rows} == {("tiny", 3), ("models", 1)}


# Errors.


def wrong(*args: Any) -> Tensor:
    return torch.nn.functional.batch_norm(*args) * 1.01


def raising(*args: Any) -> Tensor:
    raise ValueError("no kernel\nfor this")


@pytest.mark.parametrize(
    ("function", "message"), [(wrong, "output of bnext: 0.0"), (raising, "bnext failed: ValueError: no kernel")]
)
def test_bnext_wrong_or_failing_is_an_error_and_not_a_number(
    function: Any, message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "fused", lambda _: function)
    status, rows, errors = run("tiny", *ONE)
    assert (status, rows) == (1, [])
    assert len(errors) == len(PLAIN.inputs)
    assert all("error: tiny " in error and message in error for error in errors)


@pytest.mark.parametrize(
    ("subject", "suite", "provider"),
    [(measure.BatchNorms, "tiny", "torch-no-cudnn"), (measure.Models, "compiled", "torch-compile")],
)
def test_torch_further_from_right_is_timed_with_a_note(
    subject: type, suite: str, provider: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Any, name: str, made: Any) -> None:
        if name == provider:
            raise MismatchError("inaccurate")

    monkeypatch.setattr(subject, "check", check)
    status, rows, errors = run(suite, "--device", "cuda", "--dtype", "bfloat16", "--op", "eval")
    assert (status, errors) == (0, ["python -m benchmarks: note: inaccurate"]), "once"
    assert provider in {row.provider for row in rows}


def test_torch_compile_that_fails_is_left_out_with_a_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "compiled", raising)
    status, rows, errors = run("tiny", "--dtype", "bfloat16", "--layout", "contiguous")
    assert status == 0
    assert len(errors) == 2
    assert all("note: tiny " in error and "torch-compile failed" in error for error in errors)
    assert {row.provider for row in rows} == {"torch", "bnext", "copy"}


@pytest.mark.parametrize("settings", [{"eps": 1e-2}, {"momentum": 0.3}], ids=str)
def test_another_loss_is_an_error_and_not_a_number(
    settings: dict[str, float], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong eps shows in training, wrong running statistics show in evaluation."""
    spoil(monkeypatch, **settings)
    status, rows, errors = run("training", "--no-compile", *ONE)
    assert status == 1
    assert [row.provider for row in rows] == ["torch"]
    assert len(errors) == 2
    assert "error: training tiny 4x3x8x8 float32 contiguous: losses of bnext:" in errors[0]


def test_a_peak_that_cannot_be_measured_is_a_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: measure.Models, provider: str, made: TrainerProcess) -> None:
        raise ProcessError("no memory")

    monkeypatch.setattr(measure.Models, "examine", fail)
    status, rows, errors = run("training", "--no-compile", *ONE)
    assert (status, {row.peak_bytes for row in rows}) == (0, {None})
    prefix = "python -m benchmarks: note: training tiny 4x3x8x8 float32 contiguous: no peak memory of"
    assert errors == [f"{prefix} {provider}: ProcessError: no memory" for provider in EAGER_PROVIDERS]


def test_a_missing_package_is_one_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(case: Case, device: str) -> nn.Module:
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(training, "make_model", missing)
    status, rows, errors = run("tiny,models", "--op", "eval,step")
    assert (status, {row.suite for row in rows}) == (0, {"tiny"})
    assert errors == ["python -m benchmarks: note: models tiny is left out: No module named 'timm'"]


@pytest.mark.parametrize(
    ("error", "status", "left"),
    [
        (MemoryError("out of memory"), 1, set(TENSOR_PASSES) - {"backward"}),
        (KeyboardInterrupt(), 130, {"forward"}),
        (signal.SIGTERM, 130, {"forward"}),
    ],
    ids=["fails", "interrupted", "terminated"],
)
def test_rows_from_before_and_after_a_failure_are_kept(
    error: BaseException | signal.Signals,
    status: int,
    left: set[str],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = measure.provider_call

    def failing(operation: str, *args: Any) -> Any:
        if operation == "backward":
            if isinstance(error, BaseException):
                raise error
            signal.raise_signal(error)
        return original(operation, *args)

    monkeypatch.setattr(measure, "provider_call", failing)
    found, rows, errors = run("tiny", *ONE)
    assert (found, {row.op for row in rows}) == (status, left)
    if status == 130:
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
        assert "measured so far" in errors[0]


@pytest.mark.parametrize("on", MODES)
def test_the_progress_bar_ends_where_it_should(on: str, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases of which nothing can be timed move the bar, too."""
    monkeypatch.setattr(operators, "fused", lambda epilogue: wrong if epilogue.act == "" else eager(epilogue))
    monkeypatch.setitem(models.BACKENDS, "bnext-compile", "none of this name")
    cases = select_cases(["tiny", "tiny-fused", "training", "compiled"], on, ["float32"], ["contiguous"])
    chosen = Device() if on == "cpu" else cuda.Gpu()
    outcome, finished = Outcome(), []
    measure.measure(cases, chosen, outcome, lambda _, work: finished.append(work), 1.0, rounds=1, threads=1)
    assert outcome.mismatches
    assert outcome.rows
    assert sum(finished) == pytest.approx(total_work(cases, chosen))


# A GPU.


def test_large_tensors_are_timed_in_graphs_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EAGER_MAX_BYTES", 200)
    _, rows, _ = run("tiny", "--device", "cuda", *ONE)
    modes = {(row.shape, row.mode) for row in rows}
    assert modes == {((2, 3, 4, 4), "graph"), ((4, 8), "graph"), ((4, 8), "eager")}


def test_calls_that_cannot_be_captured_are_timed_eagerly_with_a_note(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "Gpu", lambda: HostGpu(captures=False))
    _, rows, _ = run("tiny", "--device", "cuda", *ONE)
    reason = "eager, not captured: RuntimeError: operation not permitted when stream is capturing"
    assert {(row.mode, row.note) for row in rows} == {("graph", reason), ("eager", "")}


def test_plans_for_lesser_devices_are_timed_when_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[dict[str, int]] = []
    monkeypatch.setattr(_C, "cap_cuda_device", lambda **cap: caps.append(cap))
    _, rows, _ = run("tiny", "--device", "cuda", "--plans", *ONE)
    planned = {row.provider for row in rows if row.provider.startswith("bnext-")}
    assert planned == {"bnext-clusters-of-8", "bnext-no-clusters", "bnext-half-memory", "bnext-narrow-tiles"}
    # Each cap is lifted before anything else is called.
    assert caps[1::2] == [{}] * (len(caps) // 2)
    assert {tuple(cap) for cap in caps[::2]} == {("max_cluster",), ("shared_per_block",), ("max_row_bytes",)}


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float32,int8"], "int8"),
        (["--threads", "0"], "positive whole number"),
        (["--budget", "nan"], "positive number"),
        (["--rounds", "3", "--budget", "5"], "not allowed with"),
        (["--suite", "2d", "--layout", "channels_last"], "nothing to measure"),
        (["--device", "cuda", "--suite", "large"], "'large' is not one of cuda's"),
        (["--plans"], "--plans"),
        (["--touched", "--device", "cuda"], "--touched"),
        (["--suite", "2d", "--output", __file__], "File exists"),
        (["nonsense"], "nonsense"),
        (["report", "no such file"], "no such file"),
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


def test_a_package_that_is_missing_is_one_line_and_status_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.pictures", None)
    status, rows, (error,) = run("tiny", *ONE)
    assert (status, rows) == (2, []), "nothing was measured"
    assert "the extra bench has what else is needed" in error


def test_without_cuda_is_one_line_and_status_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: "it is not here")
    error = "python -m benchmarks: error: cannot measure on cuda: it is not here"
    assert run("tiny,training", "--device", "cuda") == (2, [], [error])


def test_touched_run_is_one_in_an_environment_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--touched", "--suite", "2d", "--quick", "--rounds", "1"]
    command += ["--dtype", "float32", "--op", "eval", "--no-compile", "--output", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert all(is_touched(row.environment) for row in load_rows(tmp_path / "results.json"))
