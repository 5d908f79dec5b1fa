"""Cold caches: an operation goes round several sets of tensors, which together are larger than the L2 cache."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice

from benchmarks.timing import Call

COLD_L2 = 3  # sets of so many times the L2 cache's size in all: when their turn comes again, nothing of them is left

# Tensors so small that more sets were needed are bound by launches, cold or not. Each set is an autograd graph, and
# nodes of a CUDA graph, for every provider.
MAX_SETS = 256

# A replay should take so long that the gap of a microsecond or two to the next one does not show: 0.25 ms at 4 TB/s.
GRAPH_BYTES = 1024**3
MAX_GRAPH_CALLS = 256


def buffer_sets(moved: int, l2_bytes: int, memory_bytes: int) -> int:
    """How many sets, of each of which a call reads and writes ``moved`` bytes, keep the cache cold.

    At least one, and no more than fit ``memory_bytes``.
    """
    cold = COLD_L2 * l2_bytes // moved + 1
    return max(1, min(cold, memory_bytes // moved, MAX_SETS))


def calls_per_graph(moved: int, sets: int) -> int:
    """A multiple of ``sets``, for a replay to end where the next one begins."""
    turns = -(-GRAPH_BYTES // (moved * sets))
    return sets * max(1, min(turns, MAX_GRAPH_CALLS // sets))


class Rotation:
    """One provider's operation: a call for each set of tensors, made in turn, in the provider's context."""

    def __init__(
        self, calls: Sequence[Call], context: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> None:
        self._calls = calls
        self._context = context

    def __len__(self) -> int:
        return len(self._calls)

    def run(self, number: int) -> list[object]:
        """Make ``number`` calls; returns the last result on each set.

        A result is kept until its set's next turn: freed at once, its memory would be the next call's, and in the
        cache.
        """
        results: list[object] = [None] * len(self._calls)
        with self._context():
            for index in islice(cycle(range(len(self._calls))), number):
                results[index] = self._calls[index]()
        return results
