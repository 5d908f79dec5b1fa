"""python -m benchmarks --suite training, compiled, models: what they measure, check, refuse, on the smallest models."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import HostRuntime
from tiny_models import CALLS, FIVE, MODELS, SHAPE, TRAINING, classifier, make_tiny, run, spoil
from torch import nn

from benchmarks import model_measure, models, networks, packages, peak
from benchmarks.check import MismatchError
from benchmarks.closeness import require_as_close
from benchmarks.compiled import CallChecker
from benchmarks.cuda import device
from benchmarks.model_suites import EAGER_PROVIDERS, WITHOUT, ModelCase, model_case_work, select_model_cases
from benchmarks.rows import Row, load_rows
from benchmarks.training import STEPS, TrainingChecker, make_target

ONE = ("--layout", "contiguous")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)


def case_of(suite: str, dtype: str = "float32", layout: str = "channels_last") -> ModelCase:
    return select_model_cases([suite], "cpu", [dtype], [layout])[-1]


def rows_in(output: Path) -> list[Row]:
    return load_rows(output / "results.json")


def test_five_ways_of_training_leave_rows_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "training") == 0
    rows = rows_in(tmp_path)
    assert [(row.layout, row.provider) for row in rows] == list(product(TRAINING.layouts, FIVE))
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


def test_calls_are_timed_compiled_in_training_and_evaluation(tmp_path: Path) -> None:
    assert run(tmp_path, "compiled") == 0
    rows = rows_in(tmp_path)
    assert {(row.model, row.dtype, row.op, row.provider) for row in rows} == {
        (model, dtype, op, provider)
        for model, _ in CALLS.models
        for dtype in CALLS.dtypes
        for op in CALLS.operations
        for provider in CALLS.providers
    }
    assert not any(row.losses or row.peak_bytes for row in rows)


def test_without_batch_norm_a_model_is_timed_and_has_no_losses(tmp_path: Path) -> None:
    assert run(tmp_path, "models") == 0
    rows = rows_in(tmp_path)
    assert [(row.layout, row.provider) for row in rows] == [
        (lay, p) for lay in MODELS.layouts for p in MODELS.providers
    ]
    assert [bool(row.losses) for row in rows] == [row.provider != WITHOUT for row in rows]
    assert {row.peak_bytes for row in rows} == {None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


def test_a_gpu_measures_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(model_measure, "CudaRuntime", HostRuntime)
    options = ("--device", "cuda", "--dtype", "bfloat16", "--layout", "channels_last")
    assert run(tmp_path, "training,compiled", *options) == 0
    rows = rows_in(tmp_path)
    assert {row.device for row in rows} == {"cuda"}
    assert [row.provider for row in rows if row.suite == "training"] == list(FIVE)


def test_tensors_and_models_are_measured_in_one_run(tmp_path: Path) -> None:
    options = ("--no-compile", *ONE, "--dtype", "float32", "--quick", "--op", "eval,step")
    assert run(tmp_path, "2d,training", *options) == 0
    assert {row.suite for row in rows_in(tmp_path)} == {"2d", "training"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


@pytest.mark.parametrize("settings", [{"eps": 1e-2}, {"momentum": 0.15}], ids=str)
def test_another_loss_is_an_error_and_not_a_number(
    settings: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong statistics of the batch show while it learns, wrong running ones in evaluation."""
    spoil(monkeypatch, **settings)
    assert run(tmp_path, "training", "--no-compile", *ONE) == 1
    assert [row.provider for row in rows_in(tmp_path)] == ["torch"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "error: training tiny 4x3x8x8 float32 contiguous: losses of bnext:" in errors[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_call_is_named(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = CallChecker(case_of("compiled", dtype), "cpu")
    checker.check("bnext", checker.make("bnext"))
    spoil(monkeypatch, momentum=0.3)
    with pytest.raises(MismatchError, match=r"bottleneck 4x16x6x6 .* channels_last: bn1.running_mean of bnext: "):
        checker.check("bnext", checker.make("bnext"))


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
    assert run(tmp_path, "training", *ONE) == 0
    assert [row.provider for row in rows_in(tmp_path)] == list(EAGER_PROVIDERS)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("note: " in line and line.endswith("failed: RuntimeError: no compiler") for line in errors)


def test_bnext_that_cannot_be_compiled_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing("bnext-compile", monkeypatch)
    assert run(tmp_path, "training", *ONE) == 1
    assert "bnext-compile" not in {row.provider for row in rows_in(tmp_path)}


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
    assert {row.provider for row in rows_in(tmp_path)} == set(CALLS.providers)
    assert "note: inaccurate" in capsys.readouterr().err


@pytest.mark.parametrize("error", [peak.PeakError("no memory"), KeyboardInterrupt()], ids=["fails", "interrupted"])
def test_a_peak_that_cannot_be_measured_is_a_note_and_an_interrupt_keeps_what_was(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(case: ModelCase, *_: object) -> int:
        if case.layout == "channels_last":
            raise error
        return 1

    interrupted = isinstance(error, KeyboardInterrupt)
    monkeypatch.setattr(model_measure, "measure_peak", fail)
    assert run(tmp_path, "training", "--no-compile") == (130 if interrupted else 0)
    peaks = {(row.layout, row.peak_bytes) for row in rows_in(tmp_path)}
    assert peaks == {("contiguous", 1)} | (set() if interrupted else {("channels_last", None)})
    note = "note: training tiny 4x3x8x8 float32 channels_last: no peak memory of torch: no memory"
    assert (note in capsys.readouterr().err) != interrupted


def test_a_missing_package_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny(monkeypatch, "timm/densenet121", "tiny")

    def missing(package: str, name: str) -> nn.Module:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(packages, "make", missing)
    assert run(tmp_path, "models") == 0
    assert {row.model for row in rows_in(tmp_path)} == {"tiny"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("note: models timm/densenet121 is left out: No module named 'timm'")


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


@pytest.mark.parametrize(("options", "threads"), [((), 1), (("--threads", "2"), 2)])
def test_a_suite_has_its_own_number_of_threads(
    options: tuple[str, ...], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(monkeypatch, threads=1)
    make, before, seen = models.make_model, torch.get_num_threads(), []

    def seeing(case: ModelCase, device: str) -> nn.Module:
        seen.append(torch.get_num_threads())
        return make(case, device)

    monkeypatch.setattr("benchmarks.training.make_model", seeing)
    torch.set_num_threads(3)
    try:
        assert run(tmp_path, "models", *options, own_threads=True) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {row.threads for row in rows_in(tmp_path)} == set(seen) == {threads}


def test_bfloat16_is_autocast() -> None:
    checker = TrainingChecker(case_of("training", "bfloat16"), "cpu")
    trainer = checker.make("bnext-fused")
    checker.check("bnext-fused", trainer)
    assert {parameter.dtype for parameter in trainer._model.module.parameters()} == {torch.float32}
    assert trainer._model(trainer._input).dtype == torch.bfloat16
    assert trainer.step().dtype == torch.float32


def test_what_is_dropped_at_random_is_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", lambda shape: nn.Sequential(classifier(shape), nn.Dropout(0.5)))
    checker = TrainingChecker(case_of("models"), "cpu")
    for provider in ("bnext", "bnext-fused"):
        checker.check(provider, checker.make(provider))


def test_without_batch_norm_a_step_leaves_the_parameters() -> None:
    """They are not on their way to inf while steps are timed; gradients there are."""
    trainer = TrainingChecker(case_of("models"), "cpu").make(WITHOUT)
    module = trainer._model.module
    before = [parameter.clone() for parameter in module.parameters()]
    assert trainer.step() == trainer.step()
    assert all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()


def test_what_is_removed_is_batch_norm_and_not_its_activation() -> None:
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()), Activated(3))
    models.remove_batch_norms(model)
    left = [type(module) for module in model.modules() if not list(module.children())]
    assert left == [nn.Identity, nn.Sigmoid, nn.ReLU]


def test_targets_are_classes_of_samples_or_pixels_or_yes_and_no() -> None:
    for shape, target, values in (((64, 5), (64,), 5), ((2, 3, 8, 8), (2, 8, 8), 3), ((64, 1, 1, 1), (64, 1, 1), 2)):
        found = make_target(torch.zeros(shape))
        assert found.shape == target
        assert found.unique().tolist() == list(range(values))


@pytest.mark.parametrize(
    ("network", "parameters"),
    # ResNet-20 as the paper counts it, 0.27 million; the discriminator as PyTorch's example has it.
    [(networks.ResNet20(), 269_722), (networks.discriminator(), 2_765_568)],
    ids=["resnet20", "discriminator"],
)
def test_networks_are_of_the_size_that_is_known(network: nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet20", (4, 3, 8, 8)), ("unet", (2, 3, 16, 16)), ("pointnet", (4, 3, 8))]
)
def test_every_parameter_of_a_network_learns(name: str, shape: tuple[int, ...]) -> None:
    model = models.MODELS[name](shape)
    output = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    output.square().sum().backward()
    assert output.shape[0] == shape[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(("package", "name"), [("torchvision", "shufflenet_v2_x0_5"), ("timm", "regnetx_002")])
def test_models_of_packages_are_made_beside_any_torch(package: str, name: str) -> None:
    if not find_spec("torchvision") or not find_spec(package):
        pytest.skip(f"{package} is not installed")
    model = packages.make(package, name)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 20
    models.remove_batch_norms(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
