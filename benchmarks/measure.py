"""The run of batch norms: every case is checked, then its operations are timed, on whatever device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from timeit import Timer
from typing import Any, Protocol

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import checked_providers
from benchmarks.command import error_summary
from benchmarks.float64 import Checker
from benchmarks.memory import held_by_provider
from benchmarks.operations import Tensors, floor_call, make_tensors, provider_call
from benchmarks.provenance import provenance
from benchmarks.providers import PROVIDERS, Provider, provider_makers
from benchmarks.rows import CLOCK, Provenance, Row
from benchmarks.suites import COPY, Case, check_work, estimated_work, model_bytes
from benchmarks.timing import Budget, Stopwatch, Timing, time_in_turn

Progress = Callable[[str, int], None]  # (what is being done, work that has been finished by it)
Makers = dict[str, Callable[[], Provider]]

WARM_BYTES = 2 * 1024**3


@dataclass
class Outcome:
    """Filled as the run goes, so that an interrupted run keeps what it measured."""

    rows: list[Row] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured and is not bnext's fault

    def report(self, message: str, required: bool) -> None:
        """Keep what went wrong with a provider."""
        (self.mismatches if required else self.notes).append(message)


class Device(Protocol):
    """What cases are measured on, with which providers, and how calls are timed there."""

    def ready(self) -> AbstractContextManager[object]:
        """Warm; all work that follows is the device's."""

    def provenance(self, threads: int) -> Provenance: ...

    def modes(self, case: Case) -> tuple[str, ...]: ...

    def check_work(self, case: Case) -> int:
        """The share of the time budget, and of the progress bar, that the check of a case gets."""

    def work(self, operation: str, case: Case) -> int:
        """The same for an operation in one mode."""

    def makers(self, case: Case) -> Makers: ...

    def make_sets(self, case: Case) -> list[Tensors]:
        """As many sets of tensors as an operation goes round at the most."""

    def sets(self, operation: str, case: Case) -> int: ...

    def stopwatch(
        self, mode: str, operation: str, case: Case, provider: Provider | None, sets: list[Tensors]
    ) -> tuple[Stopwatch, dict[str, Any]]:
        """Of a provider, or of the copy, ready to be timed; and fields of its row."""

    def synchronize(self) -> None:
        """Raises where the device can no longer be used."""


def warm_memory() -> None:
    """Write to as much memory as the largest cases use at once, and give it back.

    A virtual machine gets its memory from the host when it first writes to it, which takes twenty times as long as
    the system's own page fault; the case that happened to come first would pay for that.
    """
    torch.zeros(WARM_BYTES, dtype=torch.uint8).fill_(1)


class Host:
    """The CPU: calls from Python, by the host's clock, on one set of tensors."""

    def __init__(self, with_compile: bool) -> None:
        self._with_compile = with_compile

    @contextmanager
    def ready(self) -> Iterator[None]:
        warm_memory()
        yield

    def provenance(self, threads: int) -> Provenance:
        return provenance(threads)

    def modes(self, case: Case) -> tuple[str, ...]:
        return (CLOCK,)

    def check_work(self, case: Case) -> int:
        return check_work(case, self._with_compile)

    def work(self, operation: str, case: Case) -> int:
        return estimated_work(operation, case)

    def makers(self, case: Case) -> Makers:
        return provider_makers(case, self._with_compile)

    def make_sets(self, case: Case) -> list[Tensors]:
        return [make_tensors(case)]

    def sets(self, operation: str, case: Case) -> int:
        return 1

    def stopwatch(
        self, mode: str, operation: str, case: Case, provider: Provider | None, sets: list[Tensors]
    ) -> tuple[Stopwatch, dict[str, Any]]:
        (tensors,) = sets
        call = provider_call(operation, provider.function, tensors) if provider else floor_call(operation, tensors)
        return Timer(call), {}

    def synchronize(self) -> None:
        """Nothing is under way."""


def case_work(device: Device, case: Case) -> int:
    operations = sum(device.work(operation, case) for operation in case.operations)
    return device.check_work(case) + len(device.modes(case)) * operations


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

    Where bnext's result is wrong, or bnext, torch or the copy fails, there is no number but an entry in
    ``outcome.mismatches``; where another provider does, it is left out with an entry in ``outcome.notes``.
    ``threads=None`` takes torch's own number.
    """
    with set_torch_threads(threads or torch.get_num_threads()), device.ready():
        run = Run(device, outcome, device.provenance(torch.get_num_threads()))
        budget = Budget(seconds, sum(case_work(device, case) for case in cases), rounds)
        for case in cases:
            run.measure_case(case, budget, progress)


class Run:
    """What all cases of a run have in common."""

    def __init__(self, device: Device, outcome: Outcome, source: Provenance) -> None:
        self._device = device
        self._outcome = outcome
        self._source = source

    def measure_case(self, case: Case, budget: Budget, progress: Progress) -> None:
        progress(f"{case} check", 0)
        sets, providers = self._prepare(case)
        work = self._device.check_work(case)
        budget.skip(work)
        progress(f"{case} check", work)
        for operation in case.operations:
            work = self._device.work(operation, case)
            for mode in self._device.modes(case):
                doing = f"{case} {operation} {mode}"
                progress(doing, 0)
                if providers:
                    chosen = sets[: self._device.sets(operation, case)]
                    self._time_operation(operation, mode, case, chosen, providers, budget)
                else:
                    budget.skip(work)
                progress(doing, work)

    def _prepare(self, case: Case) -> tuple[list[Tensors], list[Provider]]:
        """The tensors, and the providers to be timed on them: none where bnext or torch is not right."""
        try:
            sets = self._device.make_sets(case)
            checker = Checker(case, sets[0])
        except Exception as error:  # no memory, or whatever torch raises: the next case may be fine
            self._report(f"{case}: torch failed: {error_summary(error)}", True)
            return [], []
        return sets, checked_providers(case, self._device.makers(case), checker, self._report)

    def _time_operation(
        self,
        operation: str,
        mode: str,
        case: Case,
        sets: list[Tensors],
        providers: Sequence[Provider],
        budget: Budget,
    ) -> None:
        """One row per provider and one for the copy, or none."""
        work = self._device.work(operation, case)
        stopwatches, details = {}, {}
        for name, provider in {**{provider.name: provider for provider in providers}, COPY: None}.items():
            try:
                made = self._device.stopwatch(mode, operation, case, provider, sets)
            except Exception as error:  # a kernel that refuses, no memory: whatever it is, others can be measured
                required = name in (*PROVIDERS, COPY)
                self._report(f"{case} {operation}: {name} failed: {error_summary(error)}", required)
                if required:
                    budget.skip(work)
                    return
            else:
                stopwatches[name], details[name] = made
        timings = time_in_turn(stopwatches, partial(budget.rounds, work))
        held = held_by_provider(operation, case, sets[0], providers)
        for name, timing in timings.items():
            fields = {"mode": mode, "buffer_sets": len(sets), **details[name], **held.get(name, {})}
            self._outcome.rows.append(make_row(case, operation, name, timing, self._source, **fields))

    def _report(self, message: str, required: bool) -> None:
        self._device.synchronize()
        self._outcome.report(message, required)


def make_row(case: Case, operation: str, provider: str, timing: Timing, source: Provenance, **details: Any) -> Row:
    """``details``: fields of Measurement that have a default."""
    moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
    return Row(
        suite=case.suite,
        op=operation,
        provider=provider,
        shape=case.shape,
        dtype=case.dtype,
        layout=case.layout,
        **asdict(timing),
        bytes=moved,
        gb_per_s=moved / timing.median_s / 1e9,
        **case.epilogue._asdict(),
        **details,
        **asdict(source),
    )
