"""The C library's heap, on which torch allocates its tensors: it may keep freed memory instead of returning it."""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, and the largest value that it takes for the second.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory(limit: int = 2**30) -> None:
    """Have the C library keep freed memory for the next tensors, up to ``limit`` bytes at the end of its heap.

    torch allocates CPU tensors by malloc. glibc returns the end of its heap to the system as soon as 64 MiB of it are
    free, and maps large blocks anew each time. A backward pass frees most of a network's activations, so the next step
    finds fresh pages, and the system clears each of them in a page fault: 8 to 18 % of a step in the networks measured
    (docs/usage.md). After this call the pages stay. It concerns all tensors of up to 32 MiB in this process, whatever
    allocates them; larger ones are mapped anew as before (bnext's own outputs are not: they have a cache).

    The price is resident memory, which stays near its peak, by at most ``limit`` bytes more than without. Call it once,
    before the first training step; a later call changes the limit. The environment variables ``MALLOC_TRIM_THRESHOLD_``
    and ``MALLOC_MMAP_THRESHOLD_`` do the same when a process starts. Other allocators, such as jemalloc, ignore it.

    Args:
        limit: bytes, at least 0 and below 2**31.

    Raises:
        TypeError: ``limit`` is not an int.
        ValueError: ``limit`` is out of range.
        RuntimeError: the C library is not glibc.

    Source: man 3 mallopt.
    """
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"expected limit to be an int, but got {limit!r}")
    if not 0 <= limit < 2**31:
        raise ValueError(f"expected limit to be at least 0 and below 2**31 bytes, but got {limit}")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Setting one of the two stops glibc from adapting either of them, so both are set.
    if mallopt is None or not all(
        (mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD), mallopt(_M_TRIM_THRESHOLD, limit))
    ):
        raise RuntimeError("expected the GNU C library, whose mallopt keeps freed memory, but this one has none")
