"""The GPU as a device to measure on: calls are timed cold, in graphs and from Python.

All that is asked of torch.cuda while measuring, and how bnext planned, are methods here; the tests put the host in
their place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.command import error_summary
from benchmarks.cuda.device import cuda_provenance
from benchmarks.cuda.providers import make_provider
from benchmarks.cuda.rotation import Rotation, buffer_sets, calls_per_graph
from benchmarks.cuda.stopwatch import EventStopwatch, graph_stopwatch
from benchmarks.measure import Context, Device
from benchmarks.operators import SEED, Tensors, make_tensors
from benchmarks.rows import EAGER, GRAPH
from benchmarks.suites import Case
from benchmarks.timing import Call
from benchmarks.traffic import model_bytes, tensor_bytes
from bnext import _C

Result = TypeVar("Result")

# A call on a larger tensor takes the device longer than Python; on a smaller one both numbers matter.
EAGER_MAX_BYTES = 16 * 1024**2

# Sets, graphs and results of all providers at once are at most about six times what one of them moves.
MEMORY_SHARE = 16

# Overwriting it takes a GPU of 4 TB/s 120 us, and Python about as long to enqueue the calls behind it.
SCRATCH_BYTES = 512 * 1024**2
WARM_FILLS = 4000  # about half a second: a GPU that was idle raises its clocks within that


class Gpu(Device):
    """The current GPU, which works through what is enqueued, in order.

    Sets of tensors take turns, so that the L2 cache is cold.
    """

    name = tensors = "cuda"
    trains_apart = False  # torch's allocator keeps what is freed, whoever else is there

    def __init__(self) -> None:
        self.l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        # One stream for all: autograd runs a backward on the stream of its forward, and a capture that meets work
        # of another stream, or of the legacy default one, fails.
        self._stream = torch.cuda.Stream()
        self._scratch = torch.empty(min(SCRATCH_BYTES, self.free_bytes() // 8), dtype=torch.uint8, device="cuda")

    @contextmanager
    def ready(self) -> Iterator[None]:
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):  # where everything that follows is enqueued
            for _ in range(WARM_FILLS):
                self.occupy()
            torch.cuda.synchronize()
            yield

    provenance = staticmethod(cuda_provenance)
    make_provider = staticmethod(make_provider)

    def modes(self, case: Case) -> tuple[str, ...]:
        if case.model:
            return (EAGER,)
        return (GRAPH, EAGER) if tensor_bytes(case.shape, case.dtype) < EAGER_MAX_BYTES else (GRAPH,)

    def make_sets(self, case: Case) -> list[Tensors]:
        return make_sets(case, self.tensors, max(self.sets(op, case) for op in case.operations))

    def sets(self, operation: str, case: Case) -> int:
        moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
        return buffer_sets(moved, self.l2_bytes, self.free_bytes() // MEMORY_SHARE)

    def copy_call(self, operation: str, case: Case, tensors: Tensors) -> Call:
        return copy_call(operation, case, self.tensors)

    def stopwatch(
        self, mode: str, calls: Sequence[Call], context: Context, moved: int
    ) -> tuple[EventStopwatch, dict[str, Any]]:
        """The row's note says where it is not of the mode."""
        rotation = Rotation(calls, context)
        note = ""
        if mode == GRAPH:
            try:
                stopwatch = graph_stopwatch(rotation, calls_per_graph(moved, len(calls)), self)
                return stopwatch, {"note": note, "plan": self.last_plan()}
            except Exception as error:  # torch, CUDA or a compiler's; where a capture has failed its end raises as well
                note = f"{EAGER}, not captured: {error_summary(error.__context__ or error)}"
                self.synchronize()
        rotation.run(len(rotation))
        self.synchronize()
        return EventStopwatch(self, rotation.run), {"note": note, "plan": self.last_plan()}

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

    def last_plan(self) -> str:
        """The way that the last launch of bnext's took."""
        return _C.last_cuda_plan()

    def capture(self, run: Callable[[], Result]) -> tuple[Call, Result]:
        """A call that replays what ``run`` enqueues, and what ``run`` returned: where the replays write."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = run()
        return graph.replay, result


def make_sets(case: Case, device: str, number: int) -> list[Tensors]:
    """Sets with data and a gradient each of their own; the parameters, too small to matter, are shared."""
    first = make_tensors(case, device)
    generator = torch.Generator(device).manual_seed(SEED + 1)

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, requires_grad=False).normal_(generator=generator)

    sets = [first]
    for _ in range(number - 1):
        input, grad_output = like(first.input).requires_grad_(), like(first.grad_output)
        residual = tuple(like(tensor).requires_grad_() for tensor in first.residual)
        sets.append(replace(first, input=input, grad_output=grad_output, residual=residual))
    return sets


def copy_call(operation: str, case: Case, device: str) -> Call:
    """The floor: a copy that reads and writes as many bytes as the operation's single-pass model.

    Half of them are read and half written; flat, so that the layout plays no part; random, because what a GPU draws
    to move zeros is less, and its clock may be higher.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    half = -(-model_bytes(operation, case.shape, case.dtype, case.epilogue) // (2 * dtype.itemsize))
    source = torch.empty(half, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(SEED))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
