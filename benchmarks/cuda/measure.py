"""The GPU as a device to measure on: calls are timed cold, in graphs and from Python."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.command import error_summary
from benchmarks.cuda.operations import copy_rotation, make_sets, provider_rotation
from benchmarks.cuda.providers import provider_makers
from benchmarks.cuda.rotation import Rotation, buffer_sets, calls_per_graph
from benchmarks.cuda.runtime import CudaRuntime, Runtime
from benchmarks.cuda.stopwatch import EventStopwatch, eager_stopwatch, graph_stopwatch
from benchmarks.measure import Makers
from benchmarks.operations import Tensors
from benchmarks.providers import Provider
from benchmarks.rows import EAGER, GRAPH, Provenance
from benchmarks.suites import Case, model_bytes, tensor_bytes

# A call on a larger tensor takes the device longer than Python; on a smaller one both numbers matter.
EAGER_MAX_BYTES = 16 * 1024**2

# Sets, graphs and results of all providers at once are at most about six times what one of them moves.
MEMORY_SHARE = 16

# In units of one measurement, all of which take about as long: they are rounds of the same length.
CHECK_WORK = 1
COMPILE_WORK = 10


class Gpu:
    """``with_plans``: bnext as it would be planned for lesser devices, too."""

    def __init__(self, with_compile: bool, with_plans: bool = False, runtime: Runtime | None = None) -> None:
        self._with_compile = with_compile
        self._with_plans = with_plans
        self._runtime = runtime or CudaRuntime()

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self._runtime.stream():
            self._runtime.warm_up()
            yield

    def provenance(self, threads: int) -> Provenance:
        return self._runtime.provenance(threads)

    def modes(self, case: Case) -> tuple[str, ...]:
        return (GRAPH, EAGER) if tensor_bytes(case.shape, case.dtype) < EAGER_MAX_BYTES else (GRAPH,)

    def check_work(self, case: Case) -> int:
        return CHECK_WORK + (COMPILE_WORK if self._with_compile and case.compiled else 0)

    def work(self, operation: str, case: Case) -> int:
        return 1

    def makers(self, case: Case) -> Makers:
        return provider_makers(case, self._with_compile, self._with_plans)

    def make_sets(self, case: Case) -> list[Tensors]:
        return make_sets(case, self._runtime.device, max(self.sets(op, case) for op in case.operations))

    def sets(self, operation: str, case: Case) -> int:
        moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
        return buffer_sets(moved, self._runtime.l2_bytes, self._runtime.free_bytes() // MEMORY_SHARE)

    def stopwatch(
        self, mode: str, operation: str, case: Case, provider: Provider | None, sets: list[Tensors]
    ) -> tuple[EventStopwatch, dict[str, Any]]:
        """The row's note says where it is not of the mode, its plan how bnext's kernels were launched."""
        if provider:
            rotation = provider_rotation(operation, provider, sets)
        else:
            rotation = copy_rotation(operation, case, self._runtime.device, len(sets))
        calls = calls_per_graph(model_bytes(operation, case.shape, case.dtype, case.epilogue), len(sets))
        stopwatch, note = self._of_mode(mode, rotation, calls)
        ours = provider and provider.name.startswith("bnext")
        return stopwatch, {"note": note, "plan": self._runtime.last_plan() if ours else ""}

    def _of_mode(self, mode: str, rotation: Rotation, calls: int) -> tuple[EventStopwatch, str]:
        note = ""
        if mode == GRAPH:
            try:
                return graph_stopwatch(rotation, calls, self._runtime), note
            except Exception as error:  # torch, CUDA and the compiler each raise their own
                note = f"{EAGER}, not captured: {error_summary(error)}"
                self._runtime.synchronize()
        rotation.run(len(rotation))
        self._runtime.synchronize()
        return eager_stopwatch(rotation, self._runtime), note

    def synchronize(self) -> None:
        self._runtime.synchronize()
