"""Outputs whose memory bnext caches, and processes that have cached nothing yet."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from bnext import _C
from bnext.functional import batch_norm

MIB = 2**20
# The blocks of which outputs below 32 MiB are pieces.
POOL_BLOCK = 64 * MIB


@pytest.fixture
def empty_cache() -> Iterator[None]:
    if _C.max_cached_bytes() < 512 * MIB:
        pytest.skip("BNEXT_CACHE_MB is set to less than these tests free")
    _C.empty_cache()
    yield
    _C.empty_cache()


def output(mebibytes: float, value: float = 1.0) -> Tensor:
    """An output of bnext of that size, each element of which is `value`."""
    input, mean, var = torch.zeros(1, 1, round(1024 * mebibytes), 256), torch.zeros(1), torch.ones(1)
    return batch_norm(input, mean, var, bias=torch.full((1,), value, dtype=torch.float32), eps=0.0)


def is_all(tensor: Tensor, value: float) -> bool:
    return bool((tensor == value).all())


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


def in_new_process(run: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """What the function returns in a process that has imported torch and bnext and called neither."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bnext", "pytest"])
    with ProcessPoolExecutor(1, context, initializer=_begin, initargs=(environment,)) as pool:
        return pool.submit(run, *arguments).result()


def _begin(environment: dict[str, str]) -> None:
    signal.alarm(60)  # ends a process that hangs
    os.environ.update(environment)
    warnings.simplefilter("error")
    # Since 3.12 Python warns of a fork where there are threads, as marks.py says.
    warnings.filterwarnings("ignore", "This process", DeprecationWarning)


def returns_in_a_fork(run: Callable[[], object]) -> bool:
    """Whether the function returns, without an error, in a fork of this process."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    signal.alarm(20)  # ends a fork that hangs
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
