"""Activation checkpointing around a fused model and inside, with dropout in the region: outputs, gradients, statistics
and random numbers are those of the unfused model under the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from checkpoint_kinds import KINDS
from networks import conv
from observe import Net, Pair, assert_same_steps, count, fused_names, pair, sequential, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bnext
from benchmarks.memory import held_by


class Region(nn.Module):
    """Has dropout, a sum, and statistics that show how often they are updated."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.last = sequential(act=nn.SiLU()), nn.Dropout(0.4), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.body(x))
        return F.relu(self.last(self.body[0](x)) + x)


class Inside(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.region, self.kind, self.bn = Region(), kind, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(checkpoint(self.region, x * 2, **KINDS[self.kind]))) + x


class Around(nn.Module):
    def __init__(self, kind: str, model: nn.Module) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, **KINDS[self.kind])


def comparable(kind: str, make: Callable[[], nn.Module]) -> Pair:
    """A model and its fused copy, which count batches alike. Where a checkpoint saves the results of batch norms,
    bnext's operator counts a batch once, but torch's layer, which counts outside of its operator, twice; there both
    models have bnext's layers."""
    original, fused = pair(make)
    return bnext.convert(original) if kind == "save batch norms" else original, fused


def assert_same_training(original: nn.Module, fused: nn.Module) -> None:
    assert_same_steps(original, fused, small(), modes=("training",), steps=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_around_a_fused_model(kind: str) -> None:
    assert_same_training(*(Around(kind, model) for model in comparable(kind, Region)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_inside_a_fused_model(kind: str) -> None:
    assert_same_training(*comparable(kind, lambda: Inside(kind)))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_checkpointed_region_is_fused_and_the_model_holds_no_more_memory(kind: str) -> None:
    original, fused = pair(lambda: Inside(kind))
    x = small().requires_grad_()
    assert count(fused(x)) == 0
    assert fused_names(fused) == ["bn", "region.body.1", "region.last"]
    if kind == "not reentrant":
        assert held_by(fused, x) <= held_by(bnext.convert(original), x)


def test_checkpoint_sequential_of_a_fused_model() -> None:
    class Parts(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self[0], 2, x, use_reentrant=False)

    models = pair(lambda: nn.Sequential(sequential(), sequential(), sequential(conv(3, 1))))
    assert_same_training(*map(Parts, models))


def without_the_random_state(self: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda z: F.relu(self.bn(self.conv(z))), x, use_reentrant=False, preserve_rng_state=False)


def with_more_than_tensors(self: Net, x: Tensor) -> Tensor:
    def region(x: Tensor, scale: float, other: Tensor | None, flag: bool = True) -> tuple[Tensor, Tensor]:
        y = F.relu(self.bn(self.conv(x) * scale))
        return (y, F.dropout(y, 0.5)) if flag and other is None else (x, x)

    a, b = checkpoint(region, x, 2.0, None, flag=True, use_reentrant=False)
    return a + b


def with_a_constant(self: Net, x: Tensor) -> Tensor:
    scale = torch.ones((), dtype=torch.float64)
    return checkpoint(lambda z: F.relu(self.bn(self.conv(z)) + z) * scale, x * 1, use_reentrant=False)


def nested(self: Net, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.3)

    def outer(x: Tensor) -> Tensor:
        return F.silu(self.bn2(checkpoint(inner, x, use_reentrant=False)) + x)

    return checkpoint(outer, x, use_reentrant=False)


@pytest.mark.parametrize("forward", [without_the_random_state, with_more_than_tensors, with_a_constant, nested])
def test_checkpoints_of_functions(forward: Callable[[Net, Tensor], Tensor]) -> None:
    assert_same_training(*pair(Net.with_forward(forward)))
