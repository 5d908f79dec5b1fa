"""Outputs of 32 MiB and more: their memory is kept when they are freed, for the next output of that size."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import math
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import to_layout
from marks import MODES, linux_only
from torch import Tensor

from bnext import _C
from bnext.functional import batch_norm

Run = Callable[..., subprocess.CompletedProcess[str]]

MIB = 2**20
# 34.03 MiB, hence 18 huge pages.
SHAPE = (2, 64, 264, 264)
BLOCK = 36 * MIB
# Of which smaller outputs are pieces.
POOL_BLOCK = 64 * MIB


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    if _C.max_cached_bytes() < 512 * MIB:
        pytest.skip("BNEXT_CACHE_MB is set to less than these tests free")
    _C.empty_cache()
    yield
    _C.empty_cache()


def output(mebibytes: int, value: float = 1.0) -> Tensor:
    """An output of bnext of that size, each element of which is `value`."""
    input, mean, var = torch.zeros(mebibytes, 64, 64, 64), torch.zeros(64), torch.ones(64)
    return batch_norm(input, mean, var, bias=torch.full((64,), value, dtype=torch.float32), eps=0.0)


def free(*sizes: int) -> list[int]:
    """Leaves one kept block for each size in MiB, given back in that order, and returns the addresses."""
    outputs = [output(size) for size in sizes]
    addresses = [y.data_ptr() for y in outputs]
    while outputs:
        del outputs[0]
    return addresses


def is_all(tensor: Tensor, value: float) -> bool:
    return bool((tensor == value).all())


def address_space() -> int:
    """Of this process, in bytes."""
    with open("/proc/self/status") as file:
        return int(file.read().split("VmSize:")[1].split()[0]) * 1024


def asks_for_huge_pages(tensor: Tensor) -> bool:
    start = end = 0
    with open("/proc/self/smaps") as file:
        for line in file:
            first, *rest = line.split()
            if "-" in first:
                start, end = (int(part, 16) for part in first.split("-"))
            elif first == "VmFlags:" and start <= tensor.data_ptr() < end:
                return "hg" in rest
    return False


def script(code: str) -> str:
    """The code, after the imports and functions that it may use."""
    names = """
    import os, resource, signal, threading, torch
    from torch import Tensor
    from bnext import _C
    from bnext.functional import batch_norm
    MIB = 2**20
    """
    functions = map(inspect.getsource, (output, is_all, address_space, asks_for_huge_pages))
    return "\n".join([inspect.cleandoc(names), *functions, inspect.cleandoc(code)])


def wave(layout: str, period: float) -> Tensor:
    return to_layout(torch.arange(math.prod(SHAPE), dtype=torch.float32).div_(period).sin_().view(SHAPE), layout)


def check_reuse(make: Callable[[], Tensor], expected: Tensor) -> None:
    """`make` returns bnext's result: the second time in the memory of the first. What is expected comes from torch's
    contiguous path: its other one sums too coarsely for so many values."""
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
@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("what", ["output", "gradient"])
def test_freed_memory_serves_the_next(what: str, layout: str, training: bool) -> None:
    def result(normalise: Callable[..., Tensor], layout: str) -> Callable[[], Tensor]:
        x, g = wave(layout, 3.0).requires_grad_(what == "gradient"), wave(layout, 5.0)
        mean, var = torch.linspace(-1, 1, 64), torch.linspace(0.5, 2, 64)
        if what == "output":
            return lambda: normalise(x, mean, var, training=training)
        y = normalise(x, mean, var, training=training)
        return lambda: torch.autograd.grad(y, x, g, retain_graph=True)[0]

    expected = result(torch.nn.functional.batch_norm, "contiguous")()
    check_reuse(result(batch_norm, layout), expected)


@linux_only
def test_memory_is_kept_from_32_mib_on() -> None:
    free(32)
    assert _C.cached_bytes() == 32 * MIB
    y = batch_norm(torch.zeros(1, 1, 8 * MIB - 1), torch.zeros(1), torch.ones(1))
    assert _C.cached_bytes() == 32 * MIB
    del y
    assert _C.cached_bytes() == 32 * MIB + POOL_BLOCK


@linux_only
def test_release_unmaps_everything() -> None:
    free(34)
    _C.empty_cache()
    kept, left = [], []
    for _ in range(3):
        before = address_space()
        free(32, 34)
        assert _C.cached_bytes() == 66 * MIB
        kept.append(abs(address_space() - before - 66 * MIB))
        _C.empty_cache()
        assert _C.cached_bytes() == 0
        left.append(abs(address_space() - before))
    # In one of the rounds Python may map an arena of its own, which is a MiB.
    assert statistics.median(kept) < MIB
    assert statistics.median(left) < MIB


@linux_only
def test_system_may_take_what_is_kept() -> None:
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
@pytest.mark.parametrize(("kept", "fits"), [(38, False), (40, True), (50, True), (52, False)])
def test_block_serves_an_output_at_most_a_quarter_smaller(kept: int, fits: bool) -> None:
    (address,) = free(kept)
    y = output(40, 2.0)
    assert is_all(y, 2.0)
    assert (y.data_ptr() == address) == fits
    assert _C.cached_bytes() == (0 if fits else kept * MIB)
    del y
    assert _C.cached_bytes() == (kept if fits else kept + 40) * MIB


@linux_only
def test_smallest_block_that_fits_is_taken() -> None:
    addresses = free(50, 44, 48, 40)
    outputs = [output(size) for size in (42, 42, 42)]
    assert [y.data_ptr() for y in outputs] == [addresses[i] for i in (1, 2, 0)]


@linux_only
def test_limit(run_python: Run) -> None:
    # For each setting what is kept after three outputs, of 32, 34 and 36 MiB, were freed in that order. Beyond the
    # limit the oldest goes; an output above it is not kept and displaces nothing.
    default = [1024, 32, 66, 102]
    expected = {"80": [80, 32, 66, 70], "33": [33, 32, 32, 32], "0": [0, 0, 0, 0]}
    expected |= dict.fromkeys(("", "abc", "-1", "80x", "9" * 30), default)
    code = f"""
    for setting in {list(expected)}:
        if os.fork() == 0:
            os.environ["BNEXT_CACHE_MB"] = setting
            outputs, kept = [output(size) for size in (32, 34, 36)], [_C.max_cached_bytes() // MIB]
            while outputs:
                del outputs[0]
                kept.append(_C.cached_bytes() // MIB)
            print(kept, flush=True)
            os._exit(0)
        assert os.wait()[1] == 0
    """
    done = run_python("-c", script(code), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert dict(zip(expected, map(json.loads, done.stdout.splitlines()), strict=True)) == expected


@linux_only
def test_kept_blocks_make_room_when_there_is_no_other(check_script: Callable[..., None]) -> None:
    code = """
    x = torch.zeros(100, 64, 64, 64)
    outputs = [output(size) for size in (64, 66, 68)]
    outputs.clear()
    assert _C.cached_bytes() == 198 * MIB
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + 48 * MIB, resource.RLIM_INFINITY))
    try:
        torch.empty(100 * MIB, dtype=torch.uint8)
    except RuntimeError:
        y = batch_norm(x, torch.zeros(64), torch.ones(64), bias=torch.full((64,), 2.0), eps=0.0)
        assert is_all(y, 2.0)
        assert _C.cached_bytes() == 0
        del y
        assert _C.cached_bytes() == 100 * MIB
        print("done")
    """
    check_script(script(code), OMP_NUM_THREADS="1", BNEXT_CACHE_MB="1024")


def test_storage_can_be_resized() -> None:
    y = output(34)
    storage, n = y.untyped_storage(), MIB // 4
    y.view(-1)[:n] = torch.arange(n)
    for mebibytes in (33, 1, 40, 1, 34):  # from block to block, out of it, and into one again
        storage.resize_(mebibytes * MIB)
        assert storage.nbytes() == mebibytes * MIB
        assert torch.equal(torch.empty(0).set_(storage, 0, (n,)), torch.arange(n, dtype=torch.float32))


@linux_only
def test_resized_storage_gives_its_block_back() -> None:
    y = output(34)
    storage = y.untyped_storage()
    storage.resize_(MIB)
    assert _C.cached_bytes() == 34 * MIB
    storage.resize_(40 * MIB)
    assert _C.cached_bytes() == 34 * MIB + POOL_BLOCK
    storage.resize_(34 * MIB)
    assert _C.cached_bytes() == 40 * MIB + POOL_BLOCK
    del y, storage
    assert _C.cached_bytes() == 74 * MIB + POOL_BLOCK


def save_and_load(tensor: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def with_lazy_copy(tensor: Tensor) -> Tensor:
    return torch._lazy_clone(tensor).add_(0.0)


@pytest.mark.parametrize("how", [torch.clone, copy.deepcopy, save_and_load, with_lazy_copy])
def test_copy_outlives_the_output(how: Callable[[Tensor], Tensor]) -> None:
    y = output(34, 2.0)
    copied = how(y)
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


@linux_only
@pytest.mark.parametrize("view", [Tensor.numpy, torch.detach, lambda y: y[1:]], ids=["numpy", "detach", "slice"])
def test_view_keeps_the_memory_of_a_freed_output(view: Callable[[Tensor], Tensor]) -> None:
    y = output(34, 2.0)
    seen = view(y)
    del y
    assert _C.cached_bytes() == 0
    y = output(34, 3.0)
    assert (seen == 2.0).all()
    del seen
    assert _C.cached_bytes() == 34 * MIB
    assert is_all(y, 3.0)


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


@linux_only
def test_without_huge_pages_a_fork_while_another_thread_frees(run_python: Run) -> None:
    # Each output that is freed displaces the one before. set_() frees without the interpreter's lock, so that the fork
    # comes while the thread unmaps.
    code = """
    y = output(34, 2.0)
    assert (is_all(y, 2.0), _C.huge_pages_enabled(), asks_for_huge_pages(y)) == (True, False, False)
    ready, stop = threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            for size in (64, 96):
                y = output(size)
                ready.set()
                y.set_()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    statuses = set()
    for _ in range(12):
        ready.clear()
        ready.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            _C.cached_bytes()
            _C.empty_cache()
            os._exit(0 if _C.cached_bytes() == 0 else 1)
        statuses.add(os.waitpid(child, 0)[1])
        if statuses != {0}:
            break
    stop.set()
    thread.join()
    print(statuses)
    """
    done = run_python("-c", script(code), OMP_NUM_THREADS="1", BNEXT_CACHE_MB="100", BNEXT_HUGE_PAGES="0")
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr


@pytest.mark.parametrize("mebibytes", [34, 2])  # the smaller one is a piece of a block
def test_profiler_sees_the_memory(mebibytes: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output(mebibytes).set_()
    used = {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}
    assert used["bnext::batch_norm_eval"] >= mebibytes * MIB
    assert used["aten::set_"] <= -mebibytes * MIB


@linux_only
def test_output_asks_for_huge_pages() -> None:
    y = output(34)
    assert y.data_ptr() % (2 * MIB) == 0
    assert asks_for_huge_pages(y) == _C.huge_pages_enabled()
