"""Outputs of 32 MiB and more: their memory is cached when they are freed, and the next output of that size takes it."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import to_layout
from marks import FLAGS, linux_only, needs_fork, pairs
from outputs import (
    MIB,
    POOL_BLOCK,
    asks_for_huge_pages,
    empty_cache,  # noqa: F401, a fixture
    in_new_process,
    is_all,
    output,
    returns_in_a_fork,
)
from torch import Tensor

from bnext import _C
from bnext.functional import batch_norm

pytestmark = pytest.mark.usefixtures("empty_cache")

# 34.03 MiB, hence 18 huge pages.
SHAPE = (2, 64, 264, 264)
BLOCK = 36 * MIB


def free(*sizes: int) -> list[int]:
    """Leave a cached block of each size in MiB, freed in that order; return the addresses."""
    outputs = [output(size) for size in sizes]
    addresses = [y.data_ptr() for y in outputs]
    while outputs:
        del outputs[0]
    return addresses


def address_space() -> int:
    """Of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def wave(layout: str, period: float) -> Tensor:
    return to_layout(torch.arange(math.prod(SHAPE), dtype=torch.float32).div_(period).sin_().view(SHAPE), layout)


@linux_only
@pairs(what=("output", "gradient"), layout=("contiguous", "channels_last"), training=FLAGS)
def test_freed_memory_serves_the_next(what: str, layout: str, training: bool) -> None:
    def result(normalise: Callable[..., Tensor], layout: str) -> Callable[[], Tensor]:
        x, g = wave(layout, 3.0).requires_grad_(what == "gradient"), wave(layout, 5.0)
        mean, var = torch.linspace(-1, 1, 64), torch.linspace(0.5, 2, 64)
        if what == "output":
            return lambda: normalise(x, mean, var, training=training)
        y = normalise(x, mean, var, training=training)
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    # torch's path for channels_last sums too coarsely for so many values.
    expected = result(torch.nn.functional.batch_norm, "contiguous")()
    make = result(batch_norm, layout)
    assert _C.cached_bytes() == 0
    y = make()
    torch.testing.assert_close(y, expected)
    address = y.data_ptr()
    y.fill_(math.nan)
    del y
    assert _C.cached_bytes() == BLOCK
    y = make()
    assert (y.data_ptr(), _C.cached_bytes()) == (address, 0)
    torch.testing.assert_close(y, expected)


@linux_only
def test_release_unmaps_everything() -> None:
    free(34)
    _C.empty_cache()
    cached, left = [], []
    for _ in range(3):
        before = address_space()
        free(32, 34)
        assert _C.cached_bytes() == 66 * MIB
        cached.append(abs(address_space() - before - 66 * MIB))
        _C.empty_cache()
        assert _C.cached_bytes() == 0
        left.append(abs(address_space() - before))
    # In one of the rounds Python may map an arena of its own, which is a MiB.
    assert statistics.median(cached) < MIB
    assert statistics.median(left) < MIB


@linux_only
def test_system_may_take_what_is_cached() -> None:
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.exists():
        pytest.skip("this system does not tell which pages are free to take")

    def free_to_take() -> int:
        return int(rollup.read_text().split("LazyFree:")[1].split()[0]) * 1024

    y = output(34)
    before = free_to_take()
    del y
    assert free_to_take() - before > 33 * MIB  # the last few pages may wait in a list of the system's


def test_outputs_alive_at_once_do_not_overlap() -> None:
    free(34, 38)
    outputs = [output(size, value) for value, size in enumerate((34, 34, 32, 36, 40))]
    assert all(is_all(y, value) for value, y in enumerate(outputs))
    ranges = sorted((y.data_ptr(), y.data_ptr() + y.nbytes) for y in outputs)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@linux_only
@pytest.mark.parametrize(("cached", "fits"), [(38, False), (40, True), (50, True), (52, False)])
def test_block_serves_an_output_at_most_a_quarter_smaller(cached: int, fits: bool) -> None:
    (address,) = free(cached)
    y = output(40, 2.0)
    assert is_all(y, 2.0)
    assert (y.data_ptr() == address) == fits
    assert _C.cached_bytes() == (0 if fits else cached * MIB)
    del y
    assert _C.cached_bytes() == (cached if fits else cached + 40) * MIB


@linux_only
def test_smallest_block_that_fits_is_taken() -> None:
    addresses = free(50, 44, 48, 40)
    outputs = [output(size) for size in (42, 42, 42)]
    assert [y.data_ptr() for y in outputs] == [addresses[i] for i in (1, 2, 0)]


def cached_after_each_is_freed() -> list[int]:
    outputs, cached = [output(size) for size in (32, 34, 36)], [_C.max_cached_bytes() // MIB]
    while outputs:
        del outputs[0]
        cached.append(_C.cached_bytes() // MIB)
    return cached


@linux_only
@pytest.mark.parametrize(
    ("setting", "limit", "cached"),
    [
        ("80", 80, [32, 66, 70]),  # the oldest goes
        ("33", 33, [32, 32, 32]),  # what is above the limit is not cached and displaces nothing
        ("0", 0, [0, 0, 0]),
        *((wrong, 1024, [32, 66, 102]) for wrong in ("", "abc", "-1", "80x", "9" * 30)),
    ],
)
def test_limit_of_the_cache(setting: str, limit: int, cached: list[int]) -> None:
    assert in_new_process(cached_after_each_is_freed, BNEXT_CACHE_MB=setting) == [limit, *cached]


def takes_cached_blocks_when_there_is_no_other_memory() -> None:
    x = torch.zeros(100, 64, 64, 64)
    outputs = [output(size) for size in (64, 66, 68)]
    outputs.clear()
    assert _C.cached_bytes() == 198 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + 48 * MIB, resource.RLIM_INFINITY))
    with pytest.raises(RuntimeError, match="memory"):
        torch.empty(100 * MIB, dtype=torch.uint8)
    y = batch_norm(x, torch.zeros(64), torch.ones(64), bias=torch.full((64,), 2.0), eps=0.0)
    assert is_all(y, 2.0)
    assert _C.cached_bytes() == 0
    del y
    assert _C.cached_bytes() == 100 * MIB


@linux_only
def test_cached_blocks_make_room_when_there_is_no_other_memory() -> None:
    in_new_process(takes_cached_blocks_when_there_is_no_other_memory, BNEXT_CACHE_MB="1024")


@linux_only
def test_storage_can_be_resized() -> None:
    """It moves out of its block into a piece of the pool, then into another block, and into its first one again."""
    y = output(34)
    storage, n = y.untyped_storage(), MIB // 4
    values = torch.arange(n, dtype=torch.float32)
    y.view(-1)[:n] = values
    # The place that it leaves is cached; for a piece that is the whole block of the pool.
    for mebibytes, cached in ((1, 34 * MIB), (40, 34 * MIB + POOL_BLOCK), (34, 40 * MIB + POOL_BLOCK)):
        storage.resize_(mebibytes * MIB)
        assert storage.nbytes() == mebibytes * MIB
        assert torch.equal(torch.empty(0).set_(storage, 0, (n,)), values)
        assert _C.cached_bytes() == cached
    del y, storage
    assert _C.cached_bytes() == 74 * MIB + POOL_BLOCK


def test_a_lazy_copy_outlives_the_output() -> None:
    y = output(34, 2.0)
    copied = torch._lazy_clone(y).add_(0.0)
    assert is_all(y, 2.0)
    del y
    y = output(34, 3.0)
    assert copied.data_ptr() != y.data_ptr()
    assert is_all(copied, 2.0)


@linux_only
def test_shared_output_gives_its_block_back() -> None:
    y = output(34, 2.0).share_memory_()
    assert y.is_shared()
    assert _C.cached_bytes() == 34 * MIB
    z = output(34, 3.0)
    assert is_all(y, 2.0)
    del y
    assert _C.cached_bytes() == 0
    assert is_all(z, 3.0)


def test_output_of_inference_mode_is_an_inference_tensor() -> None:
    with torch.inference_mode():
        assert output(34).is_inference()
    assert not output(34).is_inference()


@linux_only
def test_freed_by_another_thread() -> None:
    outputs = [output(34)]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    assert _C.cached_bytes() == 34 * MIB


def forks_while_a_thread_frees(sizes: tuple[int, ...], forks: int) -> None:
    torch.set_num_threads(1)
    ready, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            for size in sizes:
                y = output(size)
                ready.set()
                y.set_()  # frees without the interpreter's lock, so that a fork may come meanwhile

    def take_and_free() -> None:
        assert is_all(output(1, 2.0), 2.0)
        _C.empty_cache()
        assert _C.cached_bytes() == 0

    # What torch initialises at a function's first call takes the lock of the C library's atexit(). A fork at that
    # moment would leave it locked in the child for good.
    take_and_free()
    output(1).set_()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for _ in range(forks):
        ready.clear()
        ready.wait()
        assert returns_in_a_fork(take_and_free)
    stop.set()
    thread.join()


@needs_fork
@linux_only
@pytest.mark.parametrize(
    ("sizes", "forks", "environment"),
    [
        pytest.param((1,), 30, {}, id="pieces"),
        # Each output that is freed displaces the one before, which is unmapped.
        pytest.param((64, 96), 12, {"BNEXT_CACHE_MB": "100", "BNEXT_HUGE_PAGES": "0"}, id="blocks"),
    ],
)
def test_a_fork_while_another_thread_frees(sizes: tuple[int, ...], forks: int, environment: dict[str, str]) -> None:
    in_new_process(forks_while_a_thread_frees, sizes, forks, **environment)


def has_no_huge_pages() -> None:
    y = output(34, 2.0)
    assert (is_all(y, 2.0), _C.huge_pages_enabled(), asks_for_huge_pages(y)) == (True, False, False)


@linux_only
def test_output_asks_for_huge_pages_unless_they_are_switched_off() -> None:
    y = output(34)
    assert y.data_ptr() % (2 * MIB) == 0
    assert asks_for_huge_pages(y) == _C.huge_pages_enabled()
    in_new_process(has_no_huge_pages, BNEXT_HUGE_PAGES="0")


@pytest.mark.parametrize("mebibytes", [34, 2])  # the smaller one is a piece of a block
def test_profiler_sees_the_memory(mebibytes: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output(mebibytes).set_()
    used = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    assert used["bnext::batch_norm_eval"] >= mebibytes * MIB
    assert used["aten::set_"] <= -mebibytes * MIB
