"""python -m benchmarks --suite models and small-models: what people train, and the same without batch norm."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPE, classifier, make_tiny, run
from torch import nn

from benchmarks import models, networks, packages
from benchmarks.model_suites import EAGER_PROVIDERS, MODEL_SUITES, STEP, WITHOUT, ModelCase, ModelSuite
from benchmarks.model_suites import select_model_cases as select
from benchmarks.rows import Row, load_rows
from benchmarks.training import TrainingChecker, make_target

LAYOUTS = ["contiguous", "channels_last"]


def use(monkeypatch: pytest.MonkeyPatch, *names: str, threads: int | None = None) -> None:
    """As the suite of models, these."""
    make_tiny(monkeypatch)
    suite = ModelSuite(
        models=tuple((name, (SHAPE,)) for name in names),
        operations=(STEP,),
        providers=(*EAGER_PROVIDERS, WITHOUT),
        dtypes=("float32",),
        layouts=("contiguous", "channels_last"),
        seconds=1,
        compile_s=0,
        threads=threads,
    )
    monkeypatch.setitem(MODEL_SUITES["cpu"], "models", suite)


def measured(output: Path, *options: str) -> list[Row]:
    assert run(output, "models", *options) == 0
    return load_rows(output / "results.json")


def test_models_are_trained_in_both_dtypes_and_in_the_layouts_that_their_inputs_have() -> None:
    cases = select(["models"], "cpu")
    assert len(cases) == len({(case.model, case.dtype, case.layout) for case in cases}) == (15 * 2 - 1) * 2
    assert [case.layout for case in cases if case.model == "pointnet"] == ["contiguous"] * 2
    assert all(case.providers[:4] == ("torch", "bnext", "bnext-fused", "without") for case in cases)
    compiled = {case.model for case in cases if case.providers[4:] == ("torch-compile", "bnext-compile")}
    assert compiled == {"resnet20", "torchvision/resnet18"}


def test_a_quick_look_is_at_few_models_and_compiles_nothing() -> None:
    cases = select(["models"], "cpu", quick=True)
    assert {case.model for case in cases} == {"resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"}
    assert {case.providers for case in cases} == {(*EAGER_PROVIDERS, WITHOUT)}


def test_models_are_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [case.layout for case in select(["models"], "cpu", ["float32"], models=["unet"])] == LAYOUTS
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "models", "--model", "vgg")
    assert "'vgg' is not one of resnet50, resnet20, " in capsys.readouterr().err


def test_without_batch_norm_a_model_is_timed_and_has_no_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "tiny")
    rows = measured(tmp_path)
    assert [(row.layout, row.provider) for row in rows] == [
        (layout, name) for layout in LAYOUTS for name in (*EAGER_PROVIDERS, WITHOUT)
    ]
    assert [bool(row.losses) for row in rows] == [True, True, True, False] * 2
    assert {row.peak_bytes for row in rows} == {None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


def test_without_batch_norm_a_step_leaves_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not on their way to inf while steps are timed; gradients there are."""
    use(monkeypatch, "tiny")
    (case,) = select(["models"], "cpu", layouts=["contiguous"])
    trainer = TrainingChecker(case, "cpu").make(WITHOUT)
    module = trainer._model.module
    before = [parameter.clone() for parameter in module.parameters()]
    assert trainer.step() == trainer.step()
    assert all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_what_is_removed_is_batch_norm_and_not_its_activation() -> None:
    class Activated(nn.BatchNorm2d):
        """As timm's BatchNormAct2d."""

        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.ReLU()

    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()), Activated(3))
    models.remove_batch_norms(model)
    assert [type(module) for module in model.modules() if not list(module.children())] == [
        nn.Identity,
        nn.Sigmoid,
        nn.ReLU,
    ]


def test_a_missing_package_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, "timm/densenet121", "tiny")

    def missing(package: str, name: str) -> nn.Module:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(packages, "make", missing)
    assert {row.model for row in measured(tmp_path)} == {"tiny"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("note: models timm/densenet121 is left out: No module named 'timm'")


def test_what_is_dropped_at_random_is_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "dropping")
    monkeypatch.setitem(models.MODELS, "dropping", lambda shape: nn.Sequential(classifier(shape), nn.Dropout(0.5)))
    (case,) = select(["models"], "cpu", layouts=["contiguous"])
    checker = TrainingChecker(case, "cpu")
    for provider in ("bnext", "bnext-fused"):
        checker.check(provider, checker.make(provider))


@pytest.mark.parametrize(("options", "threads"), [((), 1), (("--threads", "2"), 2)])
def test_a_suite_has_its_own_number_of_threads(
    options: tuple[str, ...], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "tiny", threads=1)
    make, before, seen = models.make_model, torch.get_num_threads(), []

    def seeing(case: ModelCase, device: str) -> nn.Module:
        seen.append(torch.get_num_threads())
        return make(case, device)

    monkeypatch.setattr("benchmarks.training.make_model", seeing)
    torch.set_num_threads(3)
    try:
        rows = measured(tmp_path, *options)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {row.threads for row in rows} == set(seen) == {threads}


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
