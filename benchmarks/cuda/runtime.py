"""All that is asked of the device while measuring: streams, events, graphs and memory, and how bnext planned.

The tests put the host in its place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from benchmarks.cuda.device import cuda_provenance
from benchmarks.rows import Provenance
from benchmarks.timing import Call
from bnext import _C

Result = TypeVar("Result")

# Overwriting it takes a GPU of 4 TB/s 120 us, and Python about as long to enqueue the calls behind it.
SCRATCH_BYTES = 512 * 1024**2
WARM_FILLS = 4000  # about half a second: a GPU that was idle raises its clocks within that


class CudaRuntime:
    """The current GPU, which works through what is enqueued, in order."""

    def __init__(self) -> None:
        self.device = "cuda"
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes: int = properties.L2_cache_size
        # One stream for all: autograd runs a backward on the stream of its forward, and a capture that meets work
        # of another stream, or of the legacy default one, fails.
        self._stream = torch.cuda.Stream()
        self._scratch = torch.empty(min(SCRATCH_BYTES, self.free_bytes() // 8), dtype=torch.uint8, device="cuda")

    def provenance(self, threads: int) -> Provenance:
        return cuda_provenance(threads)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Where everything that follows is enqueued."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            yield

    def free_bytes(self) -> int:
        """What the driver has, and what torch's allocator keeps for the next tensors."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait until the device is idle; raises what went wrong on it."""
        torch.cuda.synchronize()

    def occupy(self) -> None:
        """Give the device something to do that leaves nothing of use in its caches."""
        self._scratch.zero_()

    def warm_up(self) -> None:
        for _ in range(WARM_FILLS):
            self._scratch.zero_()
        torch.cuda.synchronize()

    def last_plan(self) -> str:
        """The way that the last launch of bnext's took."""
        return _C.last_cuda_plan()

    def capture(self, run: Callable[[], Result]) -> tuple[Call, Result]:
        """A call that replays what ``run`` enqueues, and what ``run`` returned: where the replays write."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = run()
        return graph.replay, result
