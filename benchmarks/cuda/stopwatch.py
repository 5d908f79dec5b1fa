"""Timing by the device's clock: events around calls from Python, or around replays of a CUDA graph."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.cuda.rotation import Rotation

if TYPE_CHECKING:
    from benchmarks.cuda.measure import Gpu

WARM_CALLS = 3  # torch compiles, tunes and chooses algorithms in the first calls, which must precede a capture


@contextmanager
def no_collection() -> Iterator[None]:
    """Without garbage collection, as in timeit. A capture also fails if a collection destroys another graph."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class EventStopwatch:
    """Seconds between two events on the device, around repeats of ``run``, each of which makes ``calls`` calls.

    ``head_start``: the device is kept busy while the first repeats are enqueued, so that it never waits for Python
    between the events. Otherwise it is idle at the first event, and the time includes Python's.
    """

    gpu: "Gpu"
    run: Callable[[int], object]  # called with the number of repeats
    calls: int = 1
    head_start: bool = False

    def timeit(self, number: int) -> float:
        """The seconds of ``number`` calls, scaled from those of whole repeats."""
        repeats = -(-number // self.calls)
        begin, end = self.gpu.event(), self.gpu.event()
        with no_collection():
            self.gpu.synchronize()
            if self.head_start:
                self.gpu.occupy()
            begin.record()
            self.run(repeats)
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1e3 * number / (repeats * self.calls)


def graph_stopwatch(rotation: Rotation, calls: int, gpu: "Gpu") -> EventStopwatch:
    """Replays of a graph of so many calls; raises whatever prevents a capture."""
    rotation.run(max(WARM_CALLS, len(rotation)))
    gpu.synchronize()
    with no_collection():
        replay, results = gpu.capture(lambda: rotation.run(calls))
    require_replay_writes(replay, results[0], gpu)

    def replays(number: int) -> None:
        for _ in range(number):
            replay()

    return EventStopwatch(gpu, replays, calls, head_start=True)


class EmptyGraphError(Exception):
    """A capture has missed the work, for example on another stream; its replays would be timed as very fast."""


def require_replay_writes(replay: Callable[[], object], result: object, gpu: "Gpu") -> None:
    """Erase a result, and raise EmptyGraphError unless a replay writes finite values to it again."""
    tensor = result[0] if isinstance(result, tuple) else result
    if not isinstance(tensor, Tensor):
        raise EmptyGraphError(f"expected a tensor from the captured call, got {type(tensor).__name__}")
    tensor.detach().fill_(torch.nan)
    replay()
    gpu.synchronize()
    if not bool(tensor.isfinite().all()):
        raise EmptyGraphError("a replay does not write the result")
