"""What the tests of this folder share: the model, and the ways to convert it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnext

KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convert": bnext.convert,
    "fuse": lambda model: bnext.convert(model, fuse=True),
}


@pytest.fixture(params=KINDS)
def converted(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    """Makes a converted copy of a model."""
    return lambda model: KINDS[request.param](copy.deepcopy(model))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    )
    for layer in (model[1], model[4]):
        layer.running_mean.normal_()
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
