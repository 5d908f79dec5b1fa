"""keep_freed_memory: after it, tensors that were freed leave their pages for the next ones."""

from __future__ import annotations

import ctypes
import os
import resource

import pytest
import torch
from outputs import MIB, in_new_process

import bnext

own_settings = pytest.mark.skipif(
    "LD_PRELOAD" in os.environ or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ),
    reason="the environment chooses another allocator, or its settings",
)


def page_faults(mebibytes: int) -> int:
    """The page faults of the last of a few rounds, each of which fills 128 MiB of blocks of that size, as tensors are.

    Besides tensors torch allocates small objects. One of them at the end of the heap would keep all below it.
    """
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [library.malloc(mebibytes * MIB) for _ in range(128 // mebibytes)]
        for block in blocks:
            ctypes.memset(block, 1, mebibytes * MIB)
        for block in blocks:
            library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def page_faults_with_limits(mebibytes: int) -> list[int]:
    found = [page_faults(mebibytes)]
    for limit in (2**30, 0):
        bnext.keep_freed_memory(limit)
        found.append(page_faults(mebibytes))
    return found


@own_settings
@pytest.mark.parametrize("mebibytes", [1, 8, 30])
def test_freed_tensors_leave_their_pages_to_the_next(mebibytes: int) -> None:
    before, kept, returned = in_new_process(page_faults_with_limits, mebibytes)
    pages = 128 * MIB // resource.getpagesize()
    assert kept < pages // 50
    assert min(before, returned) > pages // 2


@pytest.mark.parametrize("limit", [-1, 2**31, 2**70])
def test_limits_out_of_range_are_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"expected limit to be at least 0 and below 2\*\*31 bytes, but got {limit}"):
        bnext.keep_freed_memory(limit)


@pytest.mark.parametrize("limit", [True, 1.5, "1G", None, torch.ones(2)])
def test_limits_that_are_no_integers_are_refused(limit: object) -> None:
    with pytest.raises(TypeError, match="expected limit to be an int, but got"):
        bnext.keep_freed_memory(limit)


def test_another_c_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    with pytest.raises(RuntimeError, match="expected the GNU C library"):
        bnext.keep_freed_memory()
