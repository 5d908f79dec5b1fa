"""Outputs from 256 KiB to 32 MiB: pieces of blocks of 64 MiB, which are joined again when they are freed."""

from __future__ import annotations

import random
import resource

import pytest
import torch
from marks import linux_only
from outputs import (
    MIB,
    asks_for_huge_pages,
    empty_cache,  # noqa: F401, a fixture
    in_new_process,
    is_all,
    output,
)
from outputs import POOL_BLOCK as BLOCK
from torch import Tensor

import bnext
from bnext import _C

pytestmark = pytest.mark.usefixtures("empty_cache")

KIB = 1024


@linux_only
def test_pieces_of_one_block_lie_side_by_side() -> None:
    a, b, c = output(1), output(1 / 4), output(2)
    assert (b.data_ptr() - a.data_ptr(), c.data_ptr() - b.data_ptr()) == (MIB, MIB // 4)
    assert a.data_ptr() % (2 * MIB) == 0
    assert asks_for_huge_pages(b) == _C.huge_pages_enabled()
    assert _C.cached_bytes() == 0
    del a, b, c
    assert _C.cached_bytes() == BLOCK, "all pieces of the block are free"


@linux_only
@pytest.mark.parametrize("kibibytes", [256, 257, 1000, 32 * KIB - 1])
def test_outputs_from_256_kib_to_32_mib_are_pieces(kibibytes: int) -> None:
    y = output(kibibytes / KIB)
    address = y.data_ptr()
    assert address % (2 * MIB) == 0
    y.fill_(float("nan"))
    del y
    assert _C.cached_bytes() == BLOCK
    y = output(kibibytes / KIB, 3.0)
    assert (y.data_ptr(), _C.cached_bytes()) == (address, 0)
    assert is_all(y, 3.0)


@linux_only
def test_outputs_below_256_kib_are_mallocs() -> None:
    output(255 / KIB)
    assert _C.cached_bytes() == 0, "a piece would leave a block that is free"


@linux_only
@pytest.mark.parametrize("order", ["ab", "ba", "bac", "cab"])
def test_free_neighbours_are_joined(order: str) -> None:
    alive = {name: output(1) for name in "abcd"}
    start = alive["a"].data_ptr()
    for name in order:
        del alive[name]
    whole = output(len(order), 2.0)
    assert whole.data_ptr() == start
    assert is_all(alive["d"], 1.0)


@linux_only
def test_the_smallest_free_piece_that_fits_is_taken() -> None:
    outputs = [output(size) for size in (4, 0.25, 1, 0.25, 2, 0.25)]
    addresses = [y.data_ptr() for y in outputs]
    for freed in (4, 2, 0):
        del outputs[freed]
    assert [output(size).data_ptr() for size in (0.9, 1.5, 3)] == [addresses[i] for i in (2, 4, 0)]


@linux_only
def test_blocks_are_never_joined() -> None:
    """Blocks stay apart even where the system has mapped them side by side."""
    outputs = [output(31, value) for value in range(8)]  # two in each block
    addresses = sorted(y.data_ptr() for y in outputs)
    assert all(is_all(y, value) for value, y in enumerate(outputs))
    outputs.clear()
    assert _C.cached_bytes() == 4 * BLOCK
    again = [output(31) for _ in range(8)]
    assert sorted(y.data_ptr() for y in again) == addresses


def test_outputs_keep_their_values() -> None:
    """Any pieces may be taken and freed beside them."""
    chosen = random.Random(0)
    alive: list[tuple[float, Tensor]] = []
    for value in range(300):
        if alive and chosen.random() < 0.45:
            freed, y = alive.pop(chosen.randrange(len(alive)))
            assert is_all(y, freed)
            del y
        alive.append((value, output(chosen.choice((256, 300, 1000, 5000, 9000)) / KIB, value)))
        if len(alive) > 30:
            alive.pop(chosen.randrange(len(alive)))
    assert all(is_all(y, value) for value, y in alive)


def page_faults_of_a_step() -> int:
    torch.set_num_threads(1)
    layers = [bnext.BatchNorm2d(16) for _ in range(40)]
    x = torch.randn(16, 16, 64, 64)  # 4 MiB

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        outputs = [layer(x) for layer in layers]  # alive together  # noqa: F841
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    return min(faults() for _ in range(3))


@linux_only
def test_a_step_of_training_finds_the_memory_of_the_last() -> None:
    """With malloc the outputs would be on pages that the system has taken back, and clears again."""
    assert in_new_process(page_faults_of_a_step) < 40, "160 MiB are 40960 pages"


def takes_no_piece() -> None:
    y = output(4, 2.0)
    assert not asks_for_huge_pages(y)
    assert is_all(y, 2.0)
    del y
    assert _C.cached_bytes() == 0


@linux_only
def test_malloc_serves_where_no_block_may_be_cached() -> None:
    in_new_process(takes_no_piece, BNEXT_CACHE_MB="63")


def test_a_storage_can_be_resized() -> None:
    y = output(0.5, 2.0)
    y.resize_(100)
    assert is_all(y, 2.0)
    y.resize_(1 << 20)
    assert is_all(y[:100], 2.0)
