"""The GPU as a device to measure on: calls are timed cold, in graphs and from Python.

Every use of torch.cuda while measuring, and of bnext's last plan, is a method here, which the tests replace by the
host's.
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

# On a larger tensor a call takes the device longer than Python; on a smaller one both times matter.
EAGER_MAX_BYTES = 16 * 1024**2

# The sets, graphs and results of all providers together take at most about six times the bytes that one moves.
MEMORY_SHARE = 16

# To overwrite it takes a GPU of 4 TB/s 120 us, and Python takes about as long to enqueue the next calls.
SCRATCH_BYTES = 512 * 1024**2
WARM_FILLS = 4000  # about half a second, in which an idle GPU raises its clocks


class Gpu(Device):
    """The current GPU, which executes what is enqueued in order.

    Sets of tensors take turns, so that the L2 cache is cold.
    """

    name = tensors = "cuda"
    trains_apart = False  # torch's allocator caches freed memory, so other models change nothing

    def __init__(self) -> None:
        self.l2_bytes: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        # One stream for all: autograd runs backward on the stream of its forward, and a capture fails if it meets work
        # of another stream, or of the legacy default stream.
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
        """A stopwatch, with a note for the row where the mode cannot be used."""
        rotation = Rotation(calls, context)
        note = ""
        if mode == GRAPH:
            try:
                stopwatch = graph_stopwatch(rotation, calls_per_graph(moved, len(calls)), self)
                return stopwatch, {"note": note, "plan": self.last_plan()}
            except Exception as error:  # of torch, CUDA or a compiler; after a failed capture its end raises, too
                note = f"{EAGER}, not captured: {error_summary(error.__context__ or error)}"
                self.synchronize()
        rotation.run(len(rotation))
        self.synchronize()
        return EventStopwatch(self, rotation.run), {"note": note, "plan": self.last_plan()}

    def free_bytes(self) -> int:
        """The bytes that the driver has free, and those that torch's allocator caches."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        """Wait until the device is idle; raises what went wrong on it."""
        torch.cuda.synchronize()

    def occupy(self) -> None:
        """Enqueue work that leaves nothing useful in the device's caches."""
        self._scratch.zero_()

    def last_plan(self) -> str:
        """The path of bnext's last launch."""
        return _C.last_cuda_plan()

    def capture(self, run: Callable[[], Result]) -> tuple[Call, Result]:
        """A call that replays what ``run`` enqueues, and the results of ``run``, which the replays write to."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = run()
        return graph.replay, result


def make_sets(case: Case, device: str, number: int) -> list[Tensors]:
    """Sets, each with its own data and gradient; they share the parameters, which are too small to matter."""
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

    Half of them are read and half written. The tensors are flat, so that the layout does not matter, and random: a GPU
    draws less power to move zeros, and its clock may then be higher.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    half = -(-model_bytes(operation, case.shape, case.dtype, case.epilogue) // (2 * dtype.itemsize))
    source = torch.empty(half, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(SEED))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
