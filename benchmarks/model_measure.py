"""The run of the model suites: every provider is checked, then all are timed in turn, then their memory is measured."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from timeit import Timer
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import MismatchError
from benchmarks.command import error_summary
from benchmarks.compiled import CallChecker
from benchmarks.cuda.runtime import CudaRuntime, Runtime
from benchmarks.cuda.stopwatch import EventStopwatch
from benchmarks.measure import Outcome, Progress, warm_memory
from benchmarks.model_suites import (
    COMPILE,
    MODEL_SUITES,
    STEP,
    ModelCase,
    check_work,
    model_case_work,
    operation_work,
    peak_work,
)
from benchmarks.peak import PeakError, measure_peak
from benchmarks.provenance import provenance
from benchmarks.rows import Provenance, Row
from benchmarks.suites import TORCH_COMPILE
from benchmarks.timing import Budget, Call, Stopwatch, Timing, time_in_turn
from benchmarks.training import TrainingChecker


def repeat(call: Call, number: int) -> None:
    for _ in range(number):
        call()


def measure_models(
    cases: Sequence[ModelCase],
    outcome: Outcome,
    progress: Progress,
    seconds: float,
    rounds: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    runtime: Runtime | None = None,
) -> None:
    """Check and time the cases within about ``seconds``, or with a fixed number of rounds.

    A provider that is wrong or fails has no number but an entry in ``outcome.mismatches``, unless it is torch that
    cannot be compiled here: then no compiled one has a number, and there are notes.
    """
    with set_torch_threads(threads or torch.get_num_threads()), on_device(device, runtime) as chosen:
        run = Run(device, chosen, outcome, torch.get_num_threads())
        budget = Budget(seconds, sum(model_case_work(case, device) for case in cases), rounds)
        for case in cases:
            with set_torch_threads(threads or MODEL_SUITES[device][case.suite].threads or run.threads):
                run.measure_case(case, budget, progress)


@contextmanager
def on_device(device: str, runtime: Runtime | None) -> Iterator[Runtime | None]:
    """The GPU, warm, with all that follows on one stream; of a CPU, nothing but warm memory."""
    if device == "cpu":
        warm_memory()
        yield None
        return
    runtime = runtime or CudaRuntime()
    stream: AbstractContextManager[None] = runtime.stream()
    with stream:
        runtime.warm_up()
        yield runtime


class Made(Protocol):
    """A provider with its model."""

    def prepared(self, operation: str) -> Call: ...


Provided = TypeVar("Provided", bound=Made)


class Checker(Protocol[Provided]):
    """Knows the right results of one case."""

    def make(self, provider: str) -> Provided: ...

    def check(self, provider: str, made: Provided) -> None:
        """Raise MismatchError where a result is not right."""


def make_checker(case: ModelCase, device: str) -> Checker[Any]:
    return TrainingChecker(case, device) if STEP in case.operations else CallChecker(case, device)


class Run:
    """What all cases of a run have in common. ``suites``: the device that they are of; tensors are on ``device``."""

    def __init__(self, suites: str, runtime: Runtime | None, outcome: Outcome, threads: int) -> None:
        self._suites = suites
        self._device = runtime.device if runtime else suites
        self._runtime = runtime
        self._outcome = outcome
        self.threads = threads
        self._source = runtime.provenance(threads) if runtime else provenance(threads)

    def measure_case(self, case: ModelCase, budget: Budget, progress: Progress) -> None:
        source = replace(self._source, threads=torch.get_num_threads())
        checked = self._check(case, progress)
        peaks = self._peaks(case, checked, progress)
        budget.skip(check_work(case, self._suites) + peak_work(case, self._suites))
        for operation in case.operations:
            progress(f"{case} {operation}", 0)
            work = operation_work(case, self._suites)
            if checked:
                calls = {name: self._stopwatch(provider.prepared(operation)) for name, provider in checked.items()}
                for name, timing in time_in_turn(calls, partial(budget.rounds, work)).items():
                    losses = getattr(checked[name], "losses", ())
                    row = model_row(case, operation, name, timing, source, peaks.get(name), losses)
                    self._outcome.rows.append(row)
            else:
                budget.skip(work)
            progress(f"{case} {operation}", work)

    def _check(self, case: ModelCase, progress: Progress) -> dict[str, Made]:
        """The providers to be timed."""
        torch.compiler.reset()  # after a few models of the same classes torch would refuse to compile another one
        shares = divide(check_work(case, self._suites), len(case.providers))
        progress(f"{case} check", 0)
        checked: dict[str, Made] = {}
        try:
            checker = make_checker(case, self._device)
        except Exception as error:  # no memory, or whatever torch raises: the next case may be fine
            if isinstance(error, ModuleNotFoundError):
                note = f"{case.suite} {case.model} is left out: {error}"
                self._outcome.notes += [] if note in self._outcome.notes else [note]
            else:
                self._outcome.report(f"{case}: torch failed: {error_summary(error)}", True)
            progress(f"{case} check", sum(shares))
            return checked
        for provider, share in zip(case.providers, shares, strict=True):
            progress(f"{case} check {provider}", 0)
            try:
                made = checker.make(provider)
                if self._is_right(case, checker, provider, made):
                    checked[provider] = made
            except Exception as error:
                # Where torch's own layers cannot be compiled either it is the compiler that is missing.
                required = provider != TORCH_COMPILE and (
                    not provider.endswith(COMPILE) or TORCH_COMPILE in checked or TORCH_COMPILE not in case.providers
                )
                self._outcome.report(f"{case}: {provider} failed: {error_summary(error)}", required)
            progress(f"{case} check {provider}", share)
        return checked

    def _is_right(self, case: ModelCase, checker: Checker[Any], provider: str, made: Made) -> bool:
        """Whether it is to be timed. A mismatch is an error, but that of torch.compile in a single call a note.

        On a CPU it keeps statistics in the data's dtype from forward to backward, and sums them in float32. That is
        how torch is, and it is timed as it is. In training all are to learn the same.
        """
        as_it_is = provider == TORCH_COMPILE and STEP not in case.operations
        try:
            checker.check(provider, made)
        except MismatchError as error:
            self._outcome.report(str(error), not as_it_is)
            return as_it_is
        return True

    def _peaks(self, case: ModelCase, checked: Collection[str], progress: Progress) -> dict[str, int]:
        """Of training, by provider: bytes, each in a process of its own."""
        shares = divide(peak_work(case, self._suites), len(case.providers))
        peaks = {}
        if self._device == "cuda":
            torch.cuda.empty_cache()  # the other process needs as much of the device as this one did
        for provider, share in zip(case.providers, shares, strict=True):
            progress(f"{case} memory {provider}", 0)
            if share and provider in checked:
                try:
                    peaks[provider] = measure_peak(case, provider, self._device, torch.get_num_threads())
                except PeakError as error:
                    self._outcome.report(f"{case}: no peak memory of {provider}: {error}", False)
            progress(f"{case} memory {provider}", share)
        return peaks

    def _stopwatch(self, call: Call) -> Stopwatch:
        return EventStopwatch(self._runtime, partial(repeat, call)) if self._runtime else Timer(call)


def divide(work: int, parts: int) -> list[int]:
    """Into whole parts, as equal as they can be."""
    return [work * (part + 1) // parts - work * part // parts for part in range(parts)]


def model_row(
    case: ModelCase,
    operation: str,
    provider: str,
    timing: Timing,
    source: Provenance,
    peak_bytes: int | None,
    losses: tuple[float, ...],
) -> Row:
    return Row(
        suite=case.suite,
        model=case.model,
        op=operation,
        provider=provider,
        shape=case.shape,
        dtype=case.dtype,
        layout=case.layout,
        **asdict(timing),
        bytes=0,
        gb_per_s=0.0,
        peak_bytes=peak_bytes,
        losses=losses,
        **asdict(source),
    )
