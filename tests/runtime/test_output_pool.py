"""Outputs from 256 KiB to 32 MiB: pieces of blocks of 64 MiB, which are joined again when they are freed."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable

import pytest
import torch
from marks import FORK_WARNING, linux_only, needs_fork
from test_large_outputs import MIB, _nothing_kept, asks_for_huge_pages, is_all, output  # noqa: F401, a fixture
from test_large_outputs import POOL_BLOCK as BLOCK
from test_large_outputs import script as script_of
from test_multiprocessing import forking
from torch import Tensor

from bnext import _C
from bnext.functional import batch_norm

Run = Callable[..., subprocess.CompletedProcess[str]]

KIB = 1024


def small_output(kibibytes: int, value: float = 1.0) -> Tensor:
    """An output of bnext of that size, each element of which is `value`."""
    input, mean, var = torch.zeros(1, 1, kibibytes, 256), torch.zeros(1), torch.ones(1)
    return batch_norm(input, mean, var, bias=torch.full((1,), value, dtype=torch.float32), eps=0.0)


@linux_only
def test_pieces_of_one_block_lie_side_by_side() -> None:
    a, b, c = small_output(1024), small_output(256), small_output(2048)
    assert (b.data_ptr() - a.data_ptr(), c.data_ptr() - b.data_ptr()) == (1024 * KIB, 256 * KIB)
    assert a.data_ptr() % (2 * MIB) == 0
    assert asks_for_huge_pages(b) == _C.huge_pages_enabled()
    assert _C.cached_bytes() == 0
    del a, b, c
    assert _C.cached_bytes() == BLOCK, "all of its pieces are free"


@linux_only
@pytest.mark.parametrize("kibibytes", [256, 257, 1000, 32 * KIB - 1])
def test_from_256_kib_on_to_32_mib(kibibytes: int) -> None:
    y = small_output(kibibytes)
    address = y.data_ptr()
    assert address % (2 * MIB) == 0
    y.fill_(float("nan"))
    del y
    assert _C.cached_bytes() == BLOCK
    y = small_output(kibibytes, 3.0)
    assert (y.data_ptr(), _C.cached_bytes()) == (address, 0)
    assert is_all(y, 3.0)


@linux_only
def test_less_than_256_kib_are_mallocs() -> None:
    y = small_output(255)
    assert _C.cached_bytes() == 0
    del y
    assert _C.cached_bytes() == 0, "a piece would leave a block that is free"


@linux_only
@pytest.mark.parametrize("order", ["ab", "ba", "bac", "cab"])
def test_free_neighbours_are_joined(order: str) -> None:
    alive = {name: small_output(1024) for name in "abcd"}
    start = alive["a"].data_ptr()
    for name in order:
        del alive[name]
    whole = small_output(1024 * len(order), 2.0)
    assert whole.data_ptr() == start
    assert is_all(alive["d"], 1.0)


@linux_only
def test_the_smallest_free_piece_that_fits_is_taken() -> None:
    sizes = (4096, 256, 1024, 256, 2048, 256)
    outputs = [small_output(size) for size in sizes]
    addresses = [y.data_ptr() for y in outputs]
    for freed in (4, 2, 0):
        del outputs[freed]
    assert [small_output(size).data_ptr() for size in (900, 1500, 3000)] == [addresses[i] for i in (2, 4, 0)]


@linux_only
def test_blocks_are_never_joined() -> None:
    """Not even where the system has mapped them side by side."""
    fills = [small_output(31 * KIB, value) for value in range(8)]  # two in each block
    addresses = sorted(y.data_ptr() for y in fills)
    assert all(is_all(y, value) for value, y in enumerate(fills))
    fills.clear()
    assert _C.cached_bytes() == 4 * BLOCK
    again = [small_output(31 * KIB) for _ in range(8)]
    assert sorted(y.data_ptr() for y in again) == addresses


def test_what_is_alive_keeps_its_values() -> None:
    """Whatever is taken and freed beside it."""
    chosen = random.Random(0)
    alive: list[tuple[float, Tensor]] = []
    for value in range(300):
        if alive and chosen.random() < 0.45:
            freed, y = alive.pop(chosen.randrange(len(alive)))
            assert is_all(y, freed)
            del y
        alive.append((value, small_output(chosen.choice((256, 300, 1000, 5000, 9000)), value)))
        if len(alive) > 30:
            alive.pop(chosen.randrange(len(alive)))
    assert all(is_all(y, value) for value, y in alive)


@linux_only
def test_a_step_of_training_finds_the_memory_of_the_last(run_python: Run) -> None:
    """malloc's outputs would be pages that the system has taken back and clears again."""
    code = """
    import bnext
    layers = [bnext.BatchNorm2d(16) for _ in range(40)]
    x = torch.randn(16, 16, 64, 64)  # 4 MiB

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        outputs = [layer(x) for layer in layers]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    print(min(faults() for _ in range(3)))
    """
    done = run_python("-c", script_of(code), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40, "160 MiB are 40960 pages"


@linux_only
def test_where_no_block_may_be_kept_malloc_has_them(run_python: Run) -> None:
    code = """
    y = output(4, 2.0)
    print(asks_for_huge_pages(y), is_all(y, 2.0))
    del y
    print(_C.cached_bytes())
    """
    done = run_python("-c", script_of(code), BNEXT_CACHE_MB="63")
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True", "0"]), done.stderr


def test_a_storage_can_be_resized() -> None:
    y = small_output(512, 2.0)
    y.resize_(100)
    assert is_all(y, 2.0)
    y.resize_(1 << 20)
    assert is_all(y[:100], 2.0)


@needs_fork
@linux_only
def test_a_fork_has_pieces_of_its_own(check_script: Callable[..., None]) -> None:
    code = """
    outputs = [output(4, value) for value in range(4)]
    del outputs[1]

    def run():
        torch.set_num_threads(1)
        assert is_all(outputs[1], 2.0)
        del outputs[1]
        again = output(8, 7.0)
        assert is_all(again, 7.0) and is_all(outputs[0], 0.0) and is_all(outputs[1], 3.0)
        del outputs[:], again
        assert _C.cached_bytes() == 64 * MIB

    for _ in range(2):
        assert child(run)
        assert [is_all(y, value) for y, value in zip(outputs, (0.0, 2.0, 3.0))] == [True] * 3
        assert is_all(output(4, 5.0), 5.0)
    print("done")
    """
    check_script(forking(code), "-W", FORK_WARNING)


@needs_fork
@linux_only
def test_a_fork_while_another_thread_takes_and_frees(run_python: Run) -> None:
    code = """
    ready, stop = threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            y = output(1)
            ready.set()
            y.set_()  # without the interpreter's lock

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    statuses = set()
    for _ in range(30):
        ready.clear()
        ready.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that hangs
            os._exit(0 if is_all(output(1, 2.0), 2.0) else 1)
        statuses.add(os.waitpid(child, 0)[1])
    stop.set()
    thread.join()
    print(statuses)
    """
    done = run_python("-c", script_of(code), OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr
