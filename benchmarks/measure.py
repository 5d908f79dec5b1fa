"""The run: the providers of every case are checked, then timed in turn, on any device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from timeit import Timer
from typing import Any

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.command import error_summary
from benchmarks.correctness import Checker, MismatchError
from benchmarks.operators import (
    BatchNorm,
    Provider,
    Tensors,
    floor_call,
    held,
    make_provider,
    make_tensors,
    provider_call,
)
from benchmarks.provenance import provenance
from benchmarks.rows import CLOCK, Provenance, Row
from benchmarks.suites import BNEXT, COPY, SUITES, TORCH, TORCH_BY_HAND, TORCH_COMPILE, WHOLE, Case
from benchmarks.timing import Budget, Call, Stopwatch, check_work, operation_work, time_in_turn
from benchmarks.traffic import STEP, WALKS, model_bytes
from benchmarks.trainer_process import TrainerProcess, allocations_here, peak_here, shares_here, trainer_process
from benchmarks.training import ModelChecker
from benchmarks.variants import functions
from benchmarks.walk import Walk

# Called with what is being done (None: the same as before), and the work finished since the last call.
Progress = Callable[[str | None, float], None]
Context = Callable[[], AbstractContextManager[object]]
Fields = dict[str, Any]  # of a row

WARM_BYTES = 2 * 1024**3


@dataclass
class Outcome:
    """Filled as the run goes, so that an interrupted run keeps what it measured."""

    rows: list[Row] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured, through no fault of bnext


class Device:
    """The CPU: calls from Python, the host's clock, one set of tensors. cuda.measure.Gpu overrides all of this."""

    name = "cpu"  # whose suites are measured
    tensors = "cpu"  # torch's name of it
    trains_apart = True  # each model trains in a process of its own

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Write to as much memory as the largest cases use at once, and free it.

        A virtual machine gets its memory from the host at the first write, which takes twenty times as long as the
        guest's own page fault; otherwise the first case would pay for it.
        """
        torch.zeros(WARM_BYTES, dtype=torch.uint8).fill_(1)
        yield

    provenance = staticmethod(provenance)
    make_provider = staticmethod(make_provider)

    def modes(self, case: Case) -> tuple[str, ...]:
        return (CLOCK,)

    def make_sets(self, case: Case) -> list[Tensors]:
        """As many sets of tensors as any operation rotates through."""
        return [make_tensors(case)]

    def sets(self, operation: str, case: Case) -> int:
        return 1

    def copy_call(self, operation: str, case: Case, tensors: Tensors) -> Call:
        return floor_call(operation, tensors)

    def stopwatch(self, mode: str, calls: Sequence[Call], context: Context, moved: int) -> tuple[Stopwatch, Fields]:
        """A stopwatch, ready to be used, of one call on each set of tensors; a call moves ``moved`` bytes."""
        (call,) = calls
        return Timer(call), {}

    def synchronize(self) -> None:
        """Raises where the device can no longer be used."""


class BatchNorms:
    floors: tuple[str, ...] = (COPY,)  # timed beside the providers, and not checked

    def __init__(self, case: Case, device: Device, right: BatchNorm | None = None) -> None:
        self._case = case
        self._device = device
        self._sets = device.make_sets(case)
        self._checker = Checker(case, self._sets[0], right)

    def make(self, provider: str) -> Provider:
        return self._device.make_provider(self._case, provider)

    def check(self, provider: str, made: Any) -> None:
        self._checker.check(made)

    def stopwatch(self, mode: str, operation: str, made: Provider | None) -> tuple[Stopwatch, Fields]:
        case = self._case
        sets = self._sets[: self._device.sets(operation, case)]
        moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
        fields: Fields = {"bytes": moved, "buffer_sets": len(sets)}
        if made is None:
            calls = [self._device.copy_call(operation, case, tensors) for tensors in sets]
            stopwatch, how = self._device.stopwatch(mode, calls, nullcontext, moved)
            return stopwatch, {**fields, **how, "plan": ""}
        with made.context():  # for backward this builds the graphs
            calls = [provider_call(operation, made.function, tensors) for tensors in sets]
            if operation == "forward" and case.epilogue.act:
                fields |= held(made.function, sets[0])
        stopwatch, how = self._device.stopwatch(mode, calls, made.context, moved)
        # The plan is that of bnext's last launch, whoever was called since.
        return stopwatch, {**fields, **how, **({} if made.name.startswith(BNEXT) else {"plan": ""})}


class Variants(BatchNorms):
    floors = ()

    def __init__(self, case: Case, device: Device) -> None:
        self._functions = functions(case)
        super().__init__(case, device, self._functions[TORCH_BY_HAND])

    def make(self, provider: str) -> Provider:
        return Provider(provider, self._functions[provider])

    def check(self, provider: str, made: Any) -> None:
        """Check all but batch norm of the whole tensor, whose results are different."""
        if provider != WHOLE:
            super().check(provider, made)


class Models(ModelChecker):
    floors: tuple[str, ...] = ()

    def __init__(self, case: Case, device: Device, alive: ExitStack) -> None:
        """The processes that models train in, on a device that has such processes, end with ``alive``."""
        torch.compiler.reset()  # after a few models of the same classes torch would refuse to compile another one
        self._apart = device.trains_apart and STEP in case.operations
        self._on = device
        self._alive = alive
        self._examined: dict[str, Fields] = {}  # by provider
        super().__init__(case, device.tensors)

    def _make(self, provider: str) -> Any:
        if self._apart:
            return self._alive.enter_context(self._process(provider))
        return super()._make(provider)

    def _process(self, provider: str) -> AbstractContextManager[TrainerProcess]:
        return trainer_process(self._case, provider, self._device, torch.get_num_threads())

    def stopwatch(self, mode: str, operation: str, made: Any) -> tuple[Stopwatch, Fields]:
        fields: Fields = {"bytes": 0, "plan": "", "losses": made.losses}
        if isinstance(made, TrainerProcess):
            return made, fields
        stopwatch, how = self._on.stopwatch(mode, [made.prepared(operation)], nullcontext, 0)
        return stopwatch, {**how, **fields}

    def examine(self, provider: str, made: Any) -> None:
        """The peak of memory, and where the time goes or what is allocated; raises what the process raises."""
        if not self._apart:
            with self._process(provider) as process:
                self._examined[provider] = {"peak_bytes": process.ask(peak_here)}
        elif SUITES[self._on.name][self._case.suite].allocations:
            self._examined[provider] = {"peak_bytes": made.ask(peak_here), **made.ask(allocations_here)}
        else:
            self._examined[provider] = {"peak_bytes": made.ask(peak_here), "shares": made.ask(shares_here)}

    def counted(self, name: str, made: Any) -> Fields:
        """Fields that are known only after timing."""
        faults = {"page_faults": made.page_faults} if isinstance(made, TrainerProcess) else {}
        return {**faults, **self._examined.get(name, {})}


# What is measured of one case: it makes the providers, knows the right results, and defines a call.
Subject = BatchNorms | Models | Walk


def total_work(cases: Sequence[Case], device: Device) -> float:
    """The work of all cases, in units of the time budget and the progress bar."""
    return sum(
        check_work(case, device.name)
        + len(device.modes(case)) * sum(operation_work(op, case, device.name) for op in case.operations)
        for case in cases
    )


def measure(
    cases: Sequence[Case],
    device: Device,
    outcome: Outcome,
    progress: Progress,
    seconds: float,
    rounds: int | None = None,
    threads: int | None = None,
) -> None:
    """Check and time the cases within about ``seconds``, or with a fixed number of rounds.

    An error is recorded in ``outcome.mismatches``, or in ``outcome.notes`` where it is not bnext's fault.
    ``threads=None`` takes the suite's own number, or torch's.
    """
    usual = threads or torch.get_num_threads()
    with set_torch_threads(usual), device.ready():
        budget = Budget(seconds, total_work(cases, device), rounds)
        run = Run(device, outcome, progress, budget, device.provenance(usual))
        for case in cases:
            with set_torch_threads(threads or SUITES[device.name][case.suite].threads or usual):
                run.measure(case)


def is_required(case: Case, provider: str) -> bool:
    """Whether a failure of the provider is an error, and not a note."""
    return (bool(case.model) and provider != TORCH_COMPILE) or provider in (TORCH, WHOLE, BNEXT, COPY)


@dataclass(frozen=True)
class Run:
    """What all cases of a run have in common."""

    device: Device
    outcome: Outcome
    progress: Progress
    budget: Budget
    source: Provenance

    def measure(self, case: Case) -> None:
        with ExitStack() as alive:
            self.progress(f"{case} check", 0)
            checked: dict[str, Any] = {}
            try:
                subject = self.subject(case, alive)
                checked = self.check(case, subject)
            except ModuleNotFoundError as error:
                self.report(f"{case.suite} {case.model} is left out: {error}", False)
            except Exception as error:  # out of memory, or any error of torch: the next case may succeed
                self.report(f"{case}: torch failed: {error_summary(error)}", True)
            self.done(check_work(case, self.device.name))
            for operation in case.operations:
                work = operation_work(operation, case, self.device.name)
                for mode in self.device.modes(case):
                    self.progress(f"{case} {operation} {mode}", 0)
                    if checked:
                        self.time(case, subject, operation, mode, checked, work)
                    self.done(work)

    def done(self, work: float) -> None:
        self.budget.done(work)
        self.progress(None, work)

    def subject(self, case: Case, alive: ExitStack) -> Subject:
        if not case.model:
            return (Variants if case.variant else BatchNorms)(case, self.device)
        return Walk(case) if case.operations[0] in WALKS else Models(case, self.device, alive)

    def check(self, case: Case, subject: Subject) -> dict[str, Any]:
        """The providers to be timed: none of a batch norm where bnext is wrong, or where bnext or the first provider
        fails.

        torch's own providers are timed even where their errors are larger, with a note: for example, torch.compile on a
        CPU keeps statistics in the data's dtype from forward to backward. In training, all providers must compute the
        same losses.
        """
        checked: dict[str, Any] = {}
        for provider in case.providers:
            self.progress(f"{case} check {provider}", 0)
            try:
                made = subject.make(provider)
                subject.check(provider, made)
            except MismatchError as error:
                as_it_is = provider.startswith(TORCH) and STEP not in case.operations
                self.report(str(error), not as_it_is)
                if not as_it_is:
                    continue
            except Exception as error:  # out of memory, or any error of torch or a compiler: others may succeed
                self.report(f"{case}: {provider} failed: {error_summary(error)}", is_required(case, provider))
                continue
            checked[provider] = made
        return checked if case.model or {case.providers[0], BNEXT} <= checked.keys() else {}

    def examine(self, case: Case, subject: Models, checked: Mapping[str, Any]) -> None:
        if self.device.tensors == "cuda":
            torch.cuda.empty_cache()  # the other process needs as much of the device's memory as this one did
        for provider, made in checked.items():
            self.progress(f"{case} memory and shares {provider}", 0)
            try:
                subject.examine(provider, made)
            except Exception as error:  # any error of torch there; or the process was killed, out of memory
                self.report(f"{case}: no peak memory of {provider}: {error_summary(error)}", False)

    def time(
        self, case: Case, subject: Subject, operation: str, mode: str, checked: Mapping[str, Any], work: float
    ) -> None:
        """Add one row per provider and floor, or none where a required one fails."""
        stopwatches, details = {}, {}
        for name in (*checked, *subject.floors):
            try:
                stopwatches[name], details[name] = subject.stopwatch(mode, operation, checked.get(name))
            except Exception as error:  # a refused launch, out of memory: other providers can still be measured
                required = is_required(case, name)
                self.report(f"{case} {operation}: {name} failed: {error_summary(error)}", required)
                if required:
                    return
        timings = time_in_turn(stopwatches, partial(self.budget.rounds, work))
        if isinstance(subject, Models) and SUITES[self.device.name][case.suite].peak_s:
            self.examine(case, subject, checked)
        of_case = {name: getattr(case, name) for name in ("suite", "model", "variant", "shape", "dtype", "layout")}
        source = asdict(self.source) | {"threads": torch.get_num_threads()}
        for name, timing in timings.items():
            row = Row(
                **of_case,
                op=operation,
                provider=name,
                mode=mode,
                **asdict(timing),
                gb_per_s=details[name]["bytes"] / timing.median_s / 1e9,
                **case.epilogue._asdict(),
                **details[name],
                **(subject.counted(name, checked[name]) if isinstance(subject, Models) else {}),
                **source,
            )
            self.outcome.rows.append(row)

    def report(self, message: str, required: bool) -> None:
        """Record what went wrong with a provider, once."""
        self.device.synchronize()
        kept = self.outcome.mismatches if required else self.outcome.notes
        kept += [] if message in kept else [message]
