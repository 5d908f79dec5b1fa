"""What the processes of tests/fusion run: fused models whose batch norms are synchronised."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic
from observe import assert_same_steps
from processes import World
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnext


class TwoCollectives(nn.Module):
    """Fusing the first batch norm with the sum would move its collective behind that of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x * 2)
        second = self.second(x.exp()).sin()
        return F.relu(second + first)


class OwnCollective(nn.Module):
    """Fusing the batch norm with the sum would move its collective behind that of the forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x * 2)
        total = x.detach().mean()
        distributed.all_reduce(total)
        return F.relu(first + x * total)


def local_batch(world: World) -> Tensor:
    """A process's part of the batch, with a size and a scale of its own."""
    return torch.randn(2 + world.size, 3, 5, 4, dtype=torch.float64)[world.rank :] * (1 + world.rank)


def assert_same_training(plain: nn.Module, fused: nn.Module, world: World) -> None:
    for _ in range(2):
        assert_same_steps(plain, fused, local_batch(world), modes=("training",), steps=1)


def no_collective_is_passed(world: World) -> None:
    """Fusing moves no collective past another."""
    for make in (TwoCollectives, OwnCollective):
        plain = bnext.convert(make().double(), sync=True)
        fused = bnext.convert(copy.deepcopy(plain), fuse=True)
        assert_same_training(plain, fused, world)
        assert bnext.fusion_report(fused).fused == [], make.__name__


def one_rank_may_be_unfused(world: World) -> None:
    """Hooks keep one rank from fusing. Its collectives must still come in the order of those of the other rank."""
    for make in (TwoCollectives, OwnCollective, lambda: nn.Sequential(Basic(3), TwoCollectives())):
        plain = bnext.convert(make().double(), sync=True)
        model = bnext.convert(copy.deepcopy(plain), fuse=True)
        if world.rank == 1:
            for layer in model.modules():
                layer.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        assert_same_training(plain, model, world)


def data_parallel(world: World) -> None:
    model = bnext.convert(nn.Sequential(Basic(3), nn.Conv2d(3, 2, 1)).double(), sync=True)
    fused = DistributedDataParallel(bnext.convert(copy.deepcopy(model), fuse=True))
    assert_same_training(DistributedDataParallel(model), fused, world)
    assert len(bnext.fusion_report(fused).fused) == 2
