"""What calls leave behind: memory that a repeated call does not give back, and objects that outlive their owners.

The heap and Python's blocks are counted exactly, so they show a few bytes a call. Resident memory also shows what is in
neither, such as mapped pages, but it is rounded to pages and depends on where the heap has holes. It is counted without
pages of files, such as libraries: the system drops those when it needs their place, and reads them again.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

KIB = 2**10

Step = Callable[[], object]


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (field, ctypes.c_size_t)
        for field in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


_LIBC = ctypes.CDLL(None)
COUNTS_THE_HEAP = hasattr(_LIBC, "mallinfo2")  # glibc 2.33
if COUNTS_THE_HEAP:
    _LIBC.mallinfo2.restype = _Mallinfo2


class Usage(NamedTuple):
    resident: int  # bytes, without pages of files
    heap: int  # bytes that malloc has handed out; 0 where it does not tell
    blocks: int  # of Python's own allocator
    objects: int  # that Python's garbage collector looks after
    mappings: int


# What calls may leave behind at most, however many. The heap's share is for the measurement itself and for a cache here
# and there: 100 bytes a call are 1 MB in 10,000 calls and 100 KB in 1,000.
MOST = Usage(resident=512 * KIB, heap=32 * KIB, blocks=200, objects=50, mappings=20)


def usage() -> Usage:
    gc.collect()
    heap = 0
    if COUNTS_THE_HEAP:
        # Else a leak could fill holes that are resident already, and would not show.
        _LIBC.malloc_trim(0)
        info = _LIBC.mallinfo2()
        heap = info.uordblks + info.hblkhd
    with open("/proc/self/statm") as file:
        _, resident, of_files, *_ = map(int, file.read().split())
    with open("/proc/self/maps") as file:
        mappings = sum(1 for _ in file)
    resident = (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return Usage(resident, heap, sys.getallocatedblocks(), len(gc.get_objects()), mappings)


def growth(
    steps: Sequence[Step], calls: int, warm_up: int | None = None, settle: Callable[[], None] = lambda: None
) -> Usage:
    """What `calls` calls of the steps in turn leave behind, once `warm_up` calls, by default a tenth as many, have
    filled all caches. `settle` frees what may be cached."""
    _repeat(steps, max(calls // 10, len(steps)) if warm_up is None else warm_up)
    settle()
    usage()  # the first measurement itself allocates
    before = usage()
    _repeat(steps, calls)
    settle()
    return Usage(*(b - a for a, b in zip(before, usage(), strict=True)))


def lasting_growth(steps: Sequence[Step], calls: int, warm_up: int | None = None) -> Usage:
    """As `growth`; if that is too much, the least of three measurements: a leak shows in each of them, a table that has
    doubled does not."""
    left = growth(steps, calls, warm_up)
    for _ in range(2):
        if not excess(left):
            break
        left = Usage(*map(min, left, growth(steps, calls)))
    return left


def _repeat(steps: Sequence[Step], calls: int) -> None:
    for step in itertools.islice(itertools.cycle(steps), calls):
        step()


def excess(left: Usage, most: Usage = MOST) -> dict[str, int]:
    return {what: n for what, n, limit in zip(Usage._fields, left, most, strict=True) if n > limit}


def still_alive(tensors: Iterable[Tensor], within: float = 2.0) -> Callable[[], list[tuple[int, ...]]]:
    """A function that returns the shapes of those tensors that are still alive after `within` seconds.

    A tensor that C++ still refers to keeps its Python object, too. The thread that ran a collective lets go of what it
    refers to only after it has woken up the thread that waited for it.
    """
    watched = [(tuple(t.shape), weakref.ref(t)) for t in tensors]

    def alive() -> list[tuple[int, ...]]:
        deadline = time.monotonic() + within
        while True:
            gc.collect()
            shapes = [shape for shape, tensor in watched if tensor() is not None]
            if not shapes or time.monotonic() > deadline:
                return shapes
            time.sleep(0.01)

    return alive
