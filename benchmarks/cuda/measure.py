"""The GPU as a device to measure on: calls are timed cold, in graphs and from Python."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import error_summary
from benchmarks.cuda.providers import make_provider
from benchmarks.cuda.rotation import Rotation, buffer_sets, calls_per_graph
from benchmarks.cuda.runtime import CudaRuntime
from benchmarks.cuda.stopwatch import EventStopwatch, graph_stopwatch
from benchmarks.measure import Context, Device
from benchmarks.operators import SEED, Provider, Tensors, make_tensors
from benchmarks.rows import EAGER, GRAPH, Provenance
from benchmarks.suites import Case, model_bytes, tensor_bytes
from benchmarks.timing import Call

# A call on a larger tensor takes the device longer than Python; on a smaller one both numbers matter.
EAGER_MAX_BYTES = 16 * 1024**2

# Sets, graphs and results of all providers at once are at most about six times what one of them moves.
MEMORY_SHARE = 16


class Gpu(Device):
    """Sets of tensors take turns, so that the L2 cache is cold."""

    name = "cuda"

    def __init__(self, runtime: CudaRuntime | None = None) -> None:
        self._runtime = runtime or CudaRuntime()
        self.tensors = self._runtime.device

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self._runtime.stream():
            self._runtime.warm_up()
            yield

    def provenance(self, threads: int) -> Provenance:
        return self._runtime.provenance(threads)

    def modes(self, case: Case) -> tuple[str, ...]:
        if case.model:
            return (EAGER,)
        return (GRAPH, EAGER) if tensor_bytes(case.shape, case.dtype) < EAGER_MAX_BYTES else (GRAPH,)

    def make_provider(self, case: Case, name: str) -> Provider:
        return make_provider(case, name)

    def make_sets(self, case: Case) -> list[Tensors]:
        return make_sets(case, self.tensors, max(self.sets(op, case) for op in case.operations))

    def sets(self, operation: str, case: Case) -> int:
        moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
        return buffer_sets(moved, self._runtime.l2_bytes, self._runtime.free_bytes() // MEMORY_SHARE)

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
                stopwatch = graph_stopwatch(rotation, calls_per_graph(moved, len(calls)), self._runtime)
                return stopwatch, {"note": note, "plan": self._runtime.last_plan()}
            except Exception as error:  # torch, CUDA or a compiler's; where a capture has failed its end raises as well
                note = f"{EAGER}, not captured: {error_summary(error.__context__ or error)}"
                self._runtime.synchronize()
        rotation.run(len(rotation))
        self._runtime.synchronize()
        return EventStopwatch(self._runtime, rotation.run), {"note": note, "plan": self._runtime.last_plan()}

    def synchronize(self) -> None:
        self._runtime.synchronize()


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
