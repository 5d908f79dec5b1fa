"""The ways through the CUDA kernels: what a group is that shares a channel, one read or two, both kinds of tile.

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
PlannedFor = Callable[..., AbstractContextManager[str]]  # conftest.py
SEEDS = (0, 1)  # of the order in which the emulator runs blocks and threads


# Contiguous: planes of whole vectors and of others, and planes of which a tile takes several. The last two in
# channels_last: a number of channels that fills vectors, and one for which pixels are folded.
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
        """Of more blocks than a kernel gets unless it asks."""
        return self.group == "cluster" and self.limits.max_cluster > 8


# test_the_ways_lead_everywhere (test_cuda_plan.py) says whether they do.
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
        ((53, 2, 41, 43), (80, 9, 11, 11)),  # the size of the cluster is all that is new
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


# Of each path the first and the last, for what does not depend on the shape: whole planes, and folded pixels.
FEW_WAYS = [WAYS[i] for i in (0, 4, 5, 9, 10, 11, 12, 16, 17, 21)]
