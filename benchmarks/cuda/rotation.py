"""Cold caches: an operation rotates through several sets of tensors, which together are larger than the L2 cache."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice

from benchmarks.timing import Call

COLD_L2 = 3  # the sets' total size / the L2 cache's: when a set's turn comes again, the cache holds none of it

# Tensors so small that they would need more sets are bound by launches, cold or not. Each set takes an autograd graph,
# and nodes of a CUDA graph, for every provider.
MAX_SETS = 256

# A replay takes 0.25 ms at 4 TB/s, so that the gap of a microsecond or two to the next one is negligible.
GRAPH_BYTES = 1024**3
MAX_GRAPH_CALLS = 256


def buffer_sets(moved: int, l2_bytes: int, memory_bytes: int) -> int:
    """How many sets keep the cache cold, if a call reads and writes ``moved`` bytes of a set.

    At least one, and at most as many as fit into ``memory_bytes``.
    """
    cold = COLD_L2 * l2_bytes // moved + 1
    return max(1, min(cold, memory_bytes // moved, MAX_SETS))


def calls_per_graph(moved: int, sets: int) -> int:
    """A multiple of ``sets``, so that the next replay begins with the next set."""
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

        A result is kept until its set's next turn: if it were freed at once, the next call would get its memory, which
        is in the cache.
        """
        results: list[object] = [None] * len(self._calls)
        with self._context():
            for index in islice(cycle(range(len(self._calls))), number):
                results[index] = self._calls[index]()
        return results
