"""What the processes of tests/fusion run: fused models whose batch norms are synchronised."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic, assert_close
from processes import World
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnext


class Two(nn.Module):
    """In the order of the calls, the second collective stands between the first and its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x * 2)
        second = self.second(x.exp()).sin()
        return F.relu(second + first)


class Reduces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x * 2)
        total = x.detach().mean()
        distributed.all_reduce(total)
        return F.relu(first + x * total)


def results(model: nn.Module, x: Tensor) -> list[Any]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def share(world: World) -> Tensor:
    return torch.randn(2 + world.size, 3, 5, 4, dtype=torch.float64)[world.rank :] * (1 + world.rank)


def no_collective_is_passed(world: World) -> None:
    for make in (Two, Reduces):
        plain = bnext.convert(make().double(), sync=True)
        fused = bnext.convert(copy.deepcopy(plain), fuse=True)
        for _ in range(2):
            x = share(world)
            for actual, expected in zip(results(fused, x), results(plain, x), strict=True):
                assert_close(actual, expected, make.__name__)
        assert bnext.fusion_report(fused).fused == [], make.__name__


def one_rank_may_be_unfused(world: World) -> None:
    """A hook on one rank alone: its collectives must come in the order of the others'."""
    for make in (Two, Reduces, lambda: nn.Sequential(Basic(3), Two())):
        model = bnext.convert(make().double(), sync=True)
        reference = copy.deepcopy(model)
        bnext.convert(model, fuse=True)
        x = share(world)
        if world.rank == 1:
            for layer in model.modules():
                layer.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        for actual, expected in zip(results(model, x), results(reference, x), strict=True):
            assert_close(actual, expected, "results")


def data_parallel(world: World) -> None:
    model = bnext.convert(nn.Sequential(Basic(3), nn.Conv2d(3, 2, 1)).double(), sync=True)
    fused = DistributedDataParallel(bnext.convert(copy.deepcopy(model), fuse=True))
    plain = DistributedDataParallel(model)
    for _ in range(2):
        x = share(world)
        for actual, expected in zip(results(fused, x), results(plain, x), strict=True):
            assert_close(actual, expected, "results")
    assert len(bnext.fusion_report(fused).fused) == 2
