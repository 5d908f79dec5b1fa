"""python -m benchmarks --suite training and compiled: what they measure, check and refuse, on the smallest models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import HostRuntime
from tiny_models import CALLS, FIVE, SHAPE, TRAINING, make_tiny, run, spoil

from benchmarks import model_measure, models, peak
from benchmarks.check import MismatchError
from benchmarks.closeness import require_as_close
from benchmarks.compiled import CallChecker
from benchmarks.cuda import device
from benchmarks.model_suites import (
    EAGER_PROVIDERS,
    ModelCase,
    default_model_seconds,
    model_case_work,
    select_model_cases,
)
from benchmarks.rows import Row, load_rows
from benchmarks.suites import default_suites
from benchmarks.training import STEPS, TrainingChecker

CPU_CASES = select_model_cases(["training", "compiled"], "cpu")
CUDA_CASES = select_model_cases(["training", "compiled"], "cuda")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)


def case_of(suite: str, dtype: str = "float32", layout: str = "channels_last") -> ModelCase:
    return select_model_cases([suite], "cpu", [dtype], [layout])[-1]


def test_resnet50_is_trained_five_ways_in_both_layouts_on_a_cpu() -> None:
    chosen = [case for case in CPU_CASES if case.suite == "training"]
    assert [(c.model, c.shape, c.dtype, c.layout) for c in chosen] == [
        ("resnet50", (8, 3, 64, 64), "float32", layout) for layout in ("contiguous", "channels_last")
    ]
    assert all(case.providers == FIVE for case in chosen)


def test_on_a_gpu_it_is_the_one_of_the_papers() -> None:
    (case,) = (case for case in CUDA_CASES if case.suite == "training")
    assert (case.model, case.shape, case.dtype, case.layout) == (
        "resnet50",
        (256, 3, 224, 224),
        "bfloat16",
        "channels_last",
    )
    assert case.providers == FIVE


@pytest.mark.parametrize("cases", [CPU_CASES, CUDA_CASES], ids=["cpu", "cuda"])
def test_small_models_are_compiled_in_both_dtypes_and_layouts(cases: list[ModelCase]) -> None:
    chosen = [case for case in cases if case.suite == "compiled"]
    assert {case.model for case in chosen} == {"bn", "conv-bn-relu", "bottleneck"}
    assert len(chosen) == 5 * 2 * 2
    assert all(case.providers == ("torch-compile", "bnext-compile") for case in chosen)
    assert all(case.operations == ("forward_backward", "eval") for case in chosen)


def test_they_are_measured_only_when_they_are_named_and_have_their_own_budget() -> None:
    assert default_suites("cpu") == ["resnet50", "large", "2d"]
    assert default_model_seconds("cpu", ["training", "2d"]) == TRAINING.seconds
    assert default_model_seconds("cpu", ["training", "compiled"]) == TRAINING.seconds + CALLS.seconds


def test_what_is_asked_for_and_does_not_exist_is_left_out() -> None:
    assert not select_model_cases(["training"], "cpu", dtypes=["float16"])
    assert not select_model_cases(["training"], "cpu", operations=["eval"])
    assert not select_model_cases(["compiled"], "cpu", with_compile=False)
    (case,) = select_model_cases(["training"], "cpu", ["bfloat16"], ["contiguous"], with_compile=False)
    assert case.providers == ("torch", "bnext", "bnext-fused")


def test_five_ways_of_training_leave_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "training") == 0
    rows = load_rows(tmp_path / "results.json")
    assert [(row.layout, row.provider) for row in rows] == [(lay, name) for lay in TRAINING.layouts for name in FIVE]
    for row in rows:
        assert (row.suite, row.model, row.op, row.shape) == ("training", "tiny", "step", SHAPE)
        assert (row.peak_bytes, row.rounds, row.threads) == (5_000_000, 1, 1)
        assert len(row.losses) == STEPS + 1
        assert row.losses == pytest.approx(rows[0].losses, rel=1e-4)
    assert rows[0].losses[0] > 1.02 * rows[0].losses[STEPS - 1], "it learns"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    output = capsys.readouterr()
    assert "bnext-compile" in output.out
    assert not output.err


@pytest.mark.parametrize("settings", [{"eps": 1e-2}, {"momentum": 0.15}], ids=str)
def test_another_loss_is_an_error_and_not_a_number(
    settings: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong statistics of the batch show while it learns, wrong running ones in evaluation."""
    spoil(monkeypatch, **settings)
    assert run(tmp_path, "training", "--no-compile", "--layout", "contiguous") == 1
    assert [row.provider for row in load_rows(tmp_path / "results.json")] == ["torch"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "error: training tiny 4x3x8x8 float32 contiguous: losses of bnext:" in errors[0]


def test_bfloat16_is_autocast() -> None:
    checker = TrainingChecker(case_of("training", "bfloat16"), "cpu")
    trainer = checker.make("bnext-fused")
    checker.check("bnext-fused", trainer)
    assert {parameter.dtype for parameter in trainer._model.module.parameters()} == {torch.float32}
    assert trainer._model(trainer._input).dtype == torch.bfloat16
    assert trainer.step().dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_call_is_named(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = CallChecker(case_of("compiled", dtype), "cpu")
    checker.check("bnext", checker.make("bnext"))
    spoil(monkeypatch, momentum=0.3)
    with pytest.raises(MismatchError, match=r"bottleneck 4x16x6x6 .* channels_last: bn1.running_mean of bnext: "):
        checker.check("bnext", checker.make("bnext"))


def test_calls_are_timed_compiled_in_training_and_evaluation(tmp_path: Path) -> None:
    assert run(tmp_path, "compiled") == 0
    rows = load_rows(tmp_path / "results.json")
    assert {(row.model, row.dtype, row.op, row.provider) for row in rows} == {
        (model, dtype, op, provider)
        for model, _ in CALLS.models
        for dtype in CALLS.dtypes
        for op in CALLS.operations
        for provider in CALLS.providers
    }
    assert not any(row.losses or row.peak_bytes for row in rows)


def failing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers of this ending cannot be made."""
    build = models.build

    def fail(case: ModelCase, provider: str, *rest: Any) -> models.Built:
        if provider.endswith(name):
            raise RuntimeError("no compiler\nmore")
        return build(case, provider, *rest)

    monkeypatch.setattr("benchmarks.training.build", fail)


def test_without_a_compiler_there_are_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing("-compile", monkeypatch)
    assert run(tmp_path, "training", "--layout", "contiguous") == 0
    assert [row.provider for row in load_rows(tmp_path / "results.json")] == list(EAGER_PROVIDERS)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("note: " in line and line.endswith("failed: RuntimeError: no compiler") for line in errors)


def test_bnext_that_cannot_be_compiled_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing("bnext-compile", monkeypatch)
    assert run(tmp_path, "training", "--layout", "contiguous") == 1
    assert "bnext-compile" not in {row.provider for row in load_rows(tmp_path / "results.json")}


def test_torch_compile_that_is_off_in_a_call_is_timed_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = CallChecker.check

    def check(self: CallChecker, provider: str, calls: Any) -> None:
        if provider == "torch-compile":
            raise MismatchError("inaccurate")
        original(self, provider, calls)

    monkeypatch.setattr(CallChecker, "check", check)
    assert run(tmp_path, "compiled", "--dtype", "float32", "--op", "eval") == 0
    assert {row.provider for row in load_rows(tmp_path / "results.json")} == set(CALLS.providers)
    assert "note: inaccurate" in capsys.readouterr().err


def test_a_peak_that_cannot_be_measured_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise peak.PeakError("no memory")

    monkeypatch.setattr(model_measure, "measure_peak", fail)
    assert run(tmp_path, "training", "--no-compile", "--layout", "contiguous") == 0
    assert {row.peak_bytes for row in load_rows(tmp_path / "results.json")} == {None}
    assert (
        "note: training tiny 4x3x8x8 float32 contiguous: no peak memory of torch: no memory" in capsys.readouterr().err
    )


def test_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(case: ModelCase, *_: object) -> int:
        if case.layout == "channels_last":
            raise KeyboardInterrupt
        return 1

    monkeypatch.setattr(model_measure, "measure_peak", interrupt)
    assert run(tmp_path, "training", "--no-compile") == 130
    assert {row.layout for row in load_rows(tmp_path / "results.json")} == {"contiguous"}


def test_a_gpu_measures_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(model_measure, "CudaRuntime", HostRuntime)
    assert (
        run(tmp_path, "training,compiled", "--device", "cuda", "--dtype", "bfloat16", "--layout", "channels_last") == 0
    )
    rows = load_rows(tmp_path / "results.json")
    assert {row.device for row in rows} == {"cuda"}
    assert [row.provider for row in rows if row.suite == "training"] == list(FIVE)


def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device.missing():
        assert run(tmp_path, "training", "--device", "cuda") == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("suite", ["training", "compiled"])
def test_the_progress_bar_ends_where_it_should(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = select_model_cases([suite], "cpu", ["float32"], with_compile=suite == "compiled")
    spoil(monkeypatch, eps=0.1)
    monkeypatch.setitem(models.BACKENDS, "bnext-compile", "none of this name")
    finished: list[int] = []
    outcome = model_measure.Outcome()
    model_measure.measure_models(cases, outcome, lambda _, work: finished.append(work), 1.0, rounds=1, threads=1)
    assert outcome.mismatches
    assert sum(finished) == sum(model_case_work(case, "cpu") for case in cases)


def test_tensors_and_models_are_measured_in_one_run(tmp_path: Path) -> None:
    options = ("--no-compile", "--layout", "contiguous", "--dtype", "float32", "--quick", "--op", "eval,step")
    assert run(tmp_path, "2d,training", *options) == 0
    rows: list[Row] = load_rows(tmp_path / "results.json")
    assert {row.suite for row in rows} == {"2d", "training"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


@pytest.mark.parametrize(
    ("error", "torchs", "right"),
    [(3e-4, 1e-4, True), (3e-4, 0.0, True), (5e-4, 1e-4, False), (3e-2, 1e-2, True), (torch.nan, 1.0, False)],
)
def test_as_close_is_a_few_times_what_torch_is_off(error: float, torchs: float, right: bool) -> None:
    expected = {"it": torch.ones(10, dtype=torch.float64)}
    actual, torch_actual = ({"it": torch.full((10,), 1 + off)} for off in (error, torchs))
    if right:
        require_as_close("{}", actual, torch_actual, expected)
    else:
        with pytest.raises(MismatchError, match=r"^it: "):
            require_as_close("{}", actual, torch_actual, expected)
