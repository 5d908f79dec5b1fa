"""Whole models: the networks, a provider's model, and the check of its results."""

import pytest
import torch
from tiny_suites import SHAPE, classifier, spoil
from torch import nn

from benchmarks import models, networks
from benchmarks.correctness import MismatchError
from benchmarks.suites import SUITES, WITHOUT, Case, select_cases
from benchmarks.training import ModelChecker, make_target
from benchmarks.walk import norm_shapes

pytestmark = pytest.mark.usefixtures("tiny")


def case_of(suite: str, dtype: str = "float32", layout: str = "channels_last") -> Case:
    return select_cases([suite], "cpu", [dtype], [layout])[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_call_is_named(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = ModelChecker(case_of("compiled", dtype), "cpu")
    checker.check("bnext", checker.make("bnext"))
    spoil(monkeypatch, momentum=0.3)
    with pytest.raises(MismatchError, match=r"bottleneck 4x16x6x6 .* channels_last: bn1.running_mean of bnext: "):
        checker.check("bnext", checker.make("bnext"))


def test_bfloat16_is_autocast() -> None:
    checker = ModelChecker(case_of("training", "bfloat16"), "cpu")
    trainer = checker.make("bnext-fused")
    checker.check("bnext-fused", trainer)
    assert {parameter.dtype for parameter in trainer._model.module.parameters()} == {torch.float32}
    assert trainer._model(trainer.input).dtype == torch.bfloat16
    assert trainer.step().dtype == torch.float32


def test_dropout_is_the_same_for_all_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", lambda shape: nn.Sequential(classifier(shape), nn.Dropout(0.5)))
    checker = ModelChecker(case_of("models"), "cpu")
    ours, fused = (checker.make(provider).results()["losses"] for provider in ("bnext", "bnext-fused"))
    torch.testing.assert_close(ours, fused, rtol=1e-3, atol=0)


def test_without_batch_norm_a_step_leaves_the_parameters() -> None:
    """Without batch norm some models diverge to inf while their steps are timed, so the learning rate is 0."""
    trainer = ModelChecker(case_of("models"), "cpu").make(WITHOUT)
    module = trainer._model.module
    before = [parameter.clone() for parameter in module.parameters()]
    assert trainer.step() == trainer.step()
    assert all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))
    assert all(parameter.grad.abs().max() > 0 for parameter in module.parameters())


def test_batch_norm_is_removed_and_its_activation_stays() -> None:
    activated = nn.BatchNorm2d(3)
    activated.act = nn.ReLU()  # as in timm's BatchNormAct2d
    model = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()), activated)
    models.remove_batch_norms(model)
    assert [type(module) for module in (*model[0], model[1])] == [nn.Identity, nn.Sigmoid, nn.ReLU]


def test_targets_are_classes_of_samples_or_of_pixels_or_binary() -> None:
    for shape, target, values in (((64, 5), (64,), 5), ((2, 3, 8, 8), (2, 8, 8), 3), ((64, 1, 1, 1), (64, 1, 1), 2)):
        found = make_target(torch.zeros(shape))
        assert found.shape == target
        assert found.unique().tolist() == list(range(values))


@pytest.mark.parametrize(
    ("network", "parameters"),
    # The numbers of the papers, and of PyTorch's example of a DCGAN.
    [(networks.ResNet50, 25_557_032), (networks.ResNet20, 269_722), (networks.discriminator, 2_765_568)],
)
def test_networks_have_the_published_number_of_parameters(network: type[nn.Module], parameters: int) -> None:
    assert sum(p.numel() for p in network().parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet20", (4, 3, 8, 8)), ("unet", (2, 3, 16, 16)), ("pointnet", (4, 3, 8)), ("tiny", SHAPE)]
)
def test_every_parameter_of_a_network_learns(name: str, shape: tuple[int, ...]) -> None:
    model = models.MODELS[name](shape)
    output = model(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    output.square().sum().backward()
    assert output.shape[0] == shape[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_suite_resnet50_has_the_batch_norms_of_the_network() -> None:
    case = Case("training", (32, 3, 224, 224), "float32", "contiguous", model="resnet50")
    assert set(norm_shapes(case)) == {input.shape for input in SUITES["cpu"]["resnet50"].inputs}


def test_resnet50_has_the_strides_of_version_1_5_and_its_blocks_begin_as_their_shortcuts() -> None:
    blocks = networks.ResNet50(num_classes=2).blocks
    strided = [block for block in blocks if block.conv2.stride == (2, 2)]
    assert len(strided) == 3
    assert all(block.conv1.stride == (1, 1) and block.shortcut[0].stride == (2, 2) for block in strided)
    assert not any(block.bn3.weight.any() for block in blocks)
