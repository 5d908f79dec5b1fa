"""The ways through the CUDA kernels: by the kind of group that works on a tile, by how often the input is read (once or
twice), and by the kind of tile.

Plans for a small device send small tensors the ways that large ones take.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
from cases import Case
from simt.device import Limits

KB = 1024
PlannedFor = Callable[..., AbstractContextManager[str]]  # the fixture `planned_for` of conftest.py
SEEDS = (0, 1)  # of the order in which the emulator runs blocks and threads

# Of the five shapes of a path. Contiguous: planes that are whole vectors, planes that are not, and small planes, of
# which a tile takes several. channels_last: channels that fill whole vectors, and channels for which pixels are folded.
LAYOUTS = ("contiguous", "contiguous", "contiguous", "channels_last", "channels_last")


class Path(NamedTuple):
    """A way through the kernels, and a device whose plans take it."""

    group: str
    two_reads: bool
    limits: Limits
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...] = LAYOUTS

    def __str__(self) -> str:
        return self.group + "-of-16" * self.large_cluster + "-two-reads" * self.two_reads

    @property
    def large_cluster(self) -> bool:
        """Whether the group is a cluster of more than 8 blocks, for which a kernel needs an attribute."""
        return self.group == "cluster" and self.limits.max_cluster > 8


# test_the_ways_take_every_path, in test_cuda_plan.py, checks that these shapes take these paths.
PATHS = (
    Path("block", False, Limits(sms=1), ((2, 4, 24, 24), (3, 5, 19, 27), (5, 24, 7, 7), (6, 48, 5, 5), (7, 9, 5, 5))),
    Path(
        "cluster",
        False,
        Limits(sms=16),
        ((16, 2, 32, 32), (9, 3, 41, 43), (64, 8, 7, 7), (40, 16, 11, 11), (40, 9, 11, 11)),
    ),
    Path(
        "cluster",
        False,
        Limits(sms=32, max_cluster=16),
        ((53, 2, 41, 43), (80, 9, 11, 11)),  # only the cluster's size is new: two shapes are enough
        ("contiguous", "channels_last"),
    ),
    Path(
        "grid",
        False,
        Limits(sms=16, max_cluster=1, shared_per_block=60 * KB),
        ((40, 2, 32, 32), (20, 3, 41, 43), (160, 8, 7, 7), (40, 16, 11, 11), (40, 9, 11, 11)),
    ),
    Path(
        "grid",
        True,
        Limits(sms=1, max_cluster=1, shared_per_block=52 * KB),
        ((48, 2, 32, 32), (24, 3, 41, 43), (200, 8, 7, 7), (60, 16, 11, 11), (90, 9, 11, 11)),
    ),
)
WAYS = [
    pytest.param(path, Case(shape, layout), id=f"{path}-{'x'.join(map(str, shape))}-{layout}")
    for path in PATHS
    for shape, layout in zip(path.shapes, path.layouts, strict=True)
]

# The first and the last way of each path (large planes, and folded pixels), for tests that depend little on the shape.
FEW_WAYS = [WAYS[i] for i in (0, 4, 5, 9, 10, 11, 12, 16, 17, 21)]
