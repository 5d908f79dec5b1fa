"""What processes run that die, hang or fail: for SyncBatchNorm, and for the tests of the pool itself."""

from __future__ import annotations

import datetime
import os
import time

import pytest
import torch
from cases import same_bits
from processes import World
from sync_shares import make_batch, make_layer, stats_of
from torch import Tensor, distributed

# Processes that die under SyncBatchNorm; each job returns the seconds that the others waited.


def survives_a_death(world: World, *, dying: int, backward: bool) -> float:
    """How long the others waited for a process that dies while they are in their forward, or backward."""
    layer = make_layer(5, act="relu")
    x = make_batch((3, 5, 2, 2)).input.requires_grad_(backward)
    y = layer(x)
    before = stats_of(layer)
    distributed.barrier()
    if world.rank == dying:
        time.sleep(0.3)
        os._exit(7)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        y.sum().backward() if backward else layer(x)
    assert x.grad is None
    assert all(map(same_bits, before, stats_of(layer)))
    return time.monotonic() - start


def waits_for_one_that_does_not_come(world: World) -> float:
    """The group's timeout ends the wait."""
    group = distributed.new_group(timeout=datetime.timedelta(seconds=2))
    layer = make_layer(5, process_group=group)
    before = stats_of(layer)
    waited = 0.0
    if world.rank != 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            layer(make_batch((3, 5)).input)
        assert all(map(same_bits, before, stats_of(layer)))
        waited = time.monotonic() - start
    distributed.barrier()
    distributed.destroy_process_group(group)
    return waited


# What the pool itself is tested with.


def answers(world: World, *, value: int) -> tuple[int, int, Tensor]:
    return world.rank, value, torch.rand(1) * value


def raises(world: World, *, rank: int) -> None:
    if world.rank == rank:
        raise KeyError("what the job said")


def warns(world: World) -> None:
    import warnings

    warnings.warn("in a worker", stacklevel=1)


def exits(world: World, *, rank: int) -> None:
    if world.rank == rank:
        print("last words", flush=True)
        os._exit(5)


def hangs(world: World, *, rank: int) -> None:
    if world.rank == rank:
        time.sleep(600)
