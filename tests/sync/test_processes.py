"""The pool of processes that other tests run in: nothing that happens in one may hang the suite or be lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import linux_only
from processes import Pool, WorkerError, World

import bnext


def answers(world: World, *, value: int) -> tuple[int, int, float]:
    return world.rank, value, torch.rand(1).item()


def raises(world: World, *, rank: int) -> None:
    if world.rank == rank:
        raise KeyError("what the job said")


def warns(world: World) -> None:
    warnings.warn("in a worker", stacklevel=1)


def exits(world: World) -> None:
    print("last words", flush=True)
    os._exit(5)


def hangs(world: World) -> None:
    time.sleep(600)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_failure_comes_back_with_its_traceback_and_the_pool_goes_on(pools: Callable[[int], Pool]) -> None:
    pool = pools(2)
    first, second = pool.run(answers, seed=3, value=7)
    before = pool.pids()
    assert first == (0, 7, second[2])
    assert second[:2] == (1, 7)
    with pytest.raises(WorkerError, match=r"rank 1: Traceback(.|\n)*KeyError: 'what the job said'"):
        pool.run(raises, rank=1)
    with pytest.raises(WorkerError, match=r"rank 0(.|\n)*UserWarning: in a worker"):
        pool.run(warns)
    assert len(pool.run(answers, value=7)) == 2
    assert pool.pids() == before


@linux_only
def test_a_dead_or_hanging_process_ends_the_pool(short_lived: Callable[..., Pool]) -> None:
    pool = short_lived(1)
    pool.start()
    first = pool.pids()
    with pytest.raises(WorkerError, match="rank 0: died, exit code 5\nlast words"):
        pool.run(exits)
    assert alive(first) == pool.pids() == []
    pool.start()
    second = pool.pids()
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 0: did not answer(.|\n)*in hangs"):
        pool.run(hangs, timeout=1)
    assert time.monotonic() - start < 10
    assert alive(second) == []


@linux_only
def test_no_process_outlives_the_tests(tmp_path: Path) -> None:
    script = (
        "import processes, types\n"
        "pool = processes.Pool(1)\n"
        "pool.start()\n"
        "print(*pool.pids(), flush=True)\n"
        "pool.run(types.SimpleNamespace(__module__='test_processes', __name__='hangs'), timeout=600)\n"
    )
    path = os.pathsep.join(str(folder) for folder in (*Path(__file__).parents[:2], Path(bnext.__file__).parents[1]))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
    ) as tests:
        pids = [int(pid) for pid in tests.stdout.readline().split()]
        assert alive(pids) == pids
        assert len(pids) == 1
        tests.kill()
    deadline = time.monotonic() + 10
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(pids) == []
