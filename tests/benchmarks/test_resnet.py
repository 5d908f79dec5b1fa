"""ResNet-50 of the suite "training" is the one that everybody means."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.resnet import Bottleneck, ResNet50
from benchmarks.suites import SUITES


@pytest.fixture(autouse=True)
def _without_memory() -> Iterator[None]:
    """Shapes are computed and no values."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_it_has_the_parameters_of_the_paper() -> None:
    assert sum(parameter.numel() for parameter in ResNet50().parameters()) == 25_557_032
    assert sum(parameter.numel() for parameter in ResNet50(num_classes=10).parameters()) == 25_557_032 - 990 * 2049


def test_its_batch_norms_are_those_of_the_suite_resnet50() -> None:
    seen: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    model = ResNet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(note)
    assert model(torch.empty(32, 3, 224, 224)).shape == (32, 1000)
    assert len(seen) == 53
    assert set(seen) == set(SUITES["resnet50"].shapes)


def test_the_stride_is_that_of_version_1_5() -> None:
    strided = [block for block in ResNet50().blocks if isinstance(block, Bottleneck) and block.conv2.stride == (2, 2)]
    assert len(strided) == 3
    assert all(block.conv1.stride == (1, 1) and block.shortcut[0].stride == (2, 2) for block in strided)


def test_a_block_begins_as_its_shortcut() -> None:
    torch.set_default_device("cpu")
    blocks = [block for block in ResNet50(num_classes=2).blocks if isinstance(block, Bottleneck)]
    assert all(not block.bn3.weight.any() and bool((block.bn1.weight == 1).all()) for block in blocks)
