"""The run on a GPU: every case is checked, then its operations are timed, cold, in graphs and from Python."""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import Checker, checked_providers, summary
from benchmarks.cuda.check import CudaChecker
from benchmarks.cuda.operations import copy_rotation, make_sets, provider_rotation
from benchmarks.cuda.providers import provider_makers
from benchmarks.cuda.rotation import Rotation, buffer_sets, calls_per_graph
from benchmarks.cuda.runtime import CudaRuntime, Runtime
from benchmarks.cuda.stopwatch import EventStopwatch, eager_stopwatch, graph_stopwatch
from benchmarks.fused_check import FusedChecker
from benchmarks.measure import Outcome, Progress, make_row
from benchmarks.memory import held_by_provider
from benchmarks.operations import FLOOR, Tensors
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.rows import EAGER, GRAPH, Provenance
from benchmarks.suites import Case, model_bytes, tensor_bytes
from benchmarks.timing import Budget, time_in_turn

# A call on a larger tensor takes the device longer than Python; on a smaller one both numbers matter.
EAGER_MAX_BYTES = 16 * 1024**2

# Sets, graphs and results of all providers at once are at most about six times what one of them moves.
MEMORY_SHARE = 16

# In units of one measurement, all of which take about as long: they are rounds of the same length.
CHECK_WORK = 1
COMPILE_WORK = 10


def modes(case: Case) -> tuple[str, ...]:
    return (GRAPH, EAGER) if tensor_bytes(case.shape, case.dtype) < EAGER_MAX_BYTES else (GRAPH,)


def make_checker(case: Case, tensors: Tensors) -> Checker:
    return FusedChecker(case, tensors) if case.epilogue.act else CudaChecker(case, tensors)


def case_check_work(case: Case, with_compile: bool) -> int:
    return CHECK_WORK + (COMPILE_WORK if with_compile and case.compiled else 0)


def case_work(case: Case, with_compile: bool) -> int:
    """The share of the time budget, and of the progress bar, that a case gets."""
    return case_check_work(case, with_compile) + len(modes(case)) * len(case.operations)


def measure(
    cases: Sequence[Case],
    outcome: Outcome,
    progress: Progress,
    seconds: float,
    rounds: int | None = None,
    threads: int | None = None,
    with_compile: bool = True,
    with_plans: bool = False,
    runtime: Runtime | None = None,
) -> None:
    """Check and time the cases within about ``seconds``, or with a fixed number of rounds.

    Where bnext's result is wrong, or bnext, torch or the copy fails, there is no number but an entry in
    ``outcome.mismatches``; where another provider does, it is left out with an entry in ``outcome.notes``.
    """
    runtime = runtime or CudaRuntime()
    with set_torch_threads(threads or torch.get_num_threads()), runtime.stream():
        run = Run(runtime, outcome, runtime.provenance(torch.get_num_threads()), with_compile, with_plans)
        runtime.warm_up()
        budget = Budget(seconds, sum(case_work(case, with_compile) for case in cases), rounds)
        for case in cases:
            run.measure_case(case, budget, progress)


class Run:
    """What all cases of a run have in common."""

    def __init__(
        self, runtime: Runtime, outcome: Outcome, source: Provenance, with_compile: bool, with_plans: bool
    ) -> None:
        self._runtime = runtime
        self._outcome = outcome
        self._source = source
        self._with_compile = with_compile
        self._with_plans = with_plans

    def measure_case(self, case: Case, budget: Budget, progress: Progress) -> None:
        progress(f"{case} check", 0)
        check_work = case_check_work(case, self._with_compile)
        sets, providers = self._prepare(case)
        budget.skip(check_work)
        progress(f"{case} check", check_work)
        for operation in case.operations:
            for mode in modes(case):
                doing = f"{case} {operation} {mode}"
                progress(doing, 0)
                if providers:
                    chosen = sets[: self._sets(case, operation)]
                    self._measure_operation(case, operation, mode, chosen, providers, budget)
                else:
                    budget.skip(1)
                progress(doing, 1)

    def _sets(self, case: Case, operation: str) -> int:
        moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
        return buffer_sets(moved, self._runtime.l2_bytes, self._runtime.free_bytes() // MEMORY_SHARE)

    def _prepare(self, case: Case) -> tuple[list[Tensors], list[Provider]]:
        """The tensors, and the providers to be timed on them: none where bnext or torch is not right."""
        try:
            sets = make_sets(case, self._runtime.device, max(self._sets(case, op) for op in case.operations))
            checker = make_checker(case, sets[0])
        except Exception as error:  # no memory, or whatever torch raises: the next case may be fine
            self._fail(f"{case}: torch failed: {summary(error)}")
            return [], []
        makers = provider_makers(case, self._with_compile, self._with_plans)
        return sets, checked_providers(case, makers, checker, self._fail)

    def _measure_operation(
        self,
        case: Case,
        operation: str,
        mode: str,
        sets: list[Tensors],
        providers: Sequence[Provider],
        budget: Budget,
    ) -> None:
        """A row a provider, or none."""
        makers = {p.name: partial(provider_rotation, operation, p, sets) for p in providers}
        makers[FLOOR] = partial(copy_rotation, operation, case, self._runtime.device, len(sets))
        calls = calls_per_graph(model_bytes(operation, case.shape, case.dtype, case.epilogue), len(sets))
        stopwatches, notes, plans = {}, {}, {}
        for name, make in makers.items():
            try:
                stopwatches[name], notes[name] = self._stopwatch(mode, make(), calls)
                plans[name] = self._runtime.last_plan() if name.startswith("bnext") else ""
            except Exception as error:  # a kernel that refuses, no memory: whatever it is, others can be measured
                required = name in (*PROVIDERS, FLOOR)
                self._fail(f"{case} {operation}: {name} failed: {summary(error)}", required)
                if required:
                    budget.skip(1)
                    return
        timings = time_in_turn(stopwatches, partial(budget.rounds, 1))
        held = held_by_provider(operation, case, sets[0], providers)
        for name, timing in timings.items():
            details = {"mode": mode, "buffer_sets": len(sets), "note": notes[name], "plan": plans[name]}
            details.update(held.get(name, {}))
            self._outcome.rows.append(make_row(case, operation, name, timing, self._source, **details))

    def _stopwatch(self, mode: str, rotation: Rotation, calls: int) -> tuple[EventStopwatch, str]:
        """A stopwatch, and a note where it is not of the mode."""
        note = ""
        if mode == GRAPH:
            try:
                return graph_stopwatch(rotation, calls, self._runtime), note
            except Exception as error:  # torch, CUDA and the compiler each raise their own
                note = f"{EAGER}, not captured: {summary(error)}"
                self._runtime.synchronize()
        rotation.run(len(rotation))
        self._runtime.synchronize()
        return eager_stopwatch(rotation, self._runtime), note

    def _fail(self, message: str, required: bool = True) -> None:
        """Report a failure; raises instead where the device can no longer be used."""
        self._runtime.synchronize()
        self._outcome.report(message, required)
