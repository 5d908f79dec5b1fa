"""The run: every case is checked, then its operations are timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from timeit import Timer
from typing import Any

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import Checker, TorchChecker, checked_providers
from benchmarks.fused_check import FusedChecker
from benchmarks.memory import held_by_provider
from benchmarks.operations import Tensors, make_tensors, operation_calls
from benchmarks.provenance import provenance
from benchmarks.providers import Provider, provider_makers
from benchmarks.rows import Provenance, Row
from benchmarks.suites import Case, case_work, check_work, estimated_work, model_bytes
from benchmarks.timing import Budget, Timing, time_in_turn

Progress = Callable[[str, int], None]  # (what is being done, work that has been finished by it)


WARM_BYTES = 2 * 1024**3


def warm_memory() -> None:
    """Write to as much memory as the largest cases use at once, and give it back.

    A virtual machine gets its memory from the host when it first writes to it, which takes twenty times as long as
    the system's own page fault; the case that happened to come first would pay for that.
    """
    torch.zeros(WARM_BYTES, dtype=torch.uint8).fill_(1)


@dataclass
class Outcome:
    """Filled as the run goes, so that an interrupted run keeps what it measured."""

    rows: list[Row] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be measured and is not bnext's fault

    def report(self, message: str, required: bool) -> None:
        """Keep what went wrong with a provider."""
        (self.mismatches if required else self.notes).append(message)


def measure(
    cases: Sequence[Case],
    outcome: Outcome,
    progress: Progress,
    seconds: float,
    rounds: int | None = None,
    threads: int | None = None,
    with_compile: bool = True,
) -> None:
    """Check and time the cases within about ``seconds``, or with a fixed number of rounds.

    A case on which bnext is wrong gets no number, but an entry in ``outcome.mismatches``. ``threads=None`` takes
    torch's own number.
    """
    with set_torch_threads(threads or torch.get_num_threads()):
        source = provenance(torch.get_num_threads())
        warm_memory()
        budget = Budget(seconds, sum(case_work(case, with_compile) for case in cases), rounds)
        for case in cases:
            progress(f"{case} check", 0)
            tensors = make_tensors(case)
            makers = provider_makers(case, with_compile)
            providers = checked_providers(case, makers, make_checker(case, tensors), outcome.report)
            work = check_work(case, with_compile) if providers else case_work(case, with_compile)
            budget.skip(work)
            progress(f"{case} check", work)
            for operation in case.operations if providers else ():
                progress(f"{case} {operation}", 0)
                outcome.rows += time_operation(operation, case, tensors, providers, budget, source)
                progress(f"{case} {operation}", estimated_work(operation, case))


def make_checker(case: Case, tensors: Tensors) -> Checker:
    return FusedChecker(case, tensors) if case.epilogue.act else TorchChecker(case, tensors)


def time_operation(
    operation: str, case: Case, tensors: Tensors, providers: Sequence[Provider], budget: Budget, source: Provenance
) -> list[Row]:
    """One row a provider, and one for the floor."""
    choose_rounds = partial(budget.rounds, estimated_work(operation, case))
    functions = {provider.name: provider.function for provider in providers}
    timers = {name: Timer(call) for name, call in operation_calls(operation, tensors, functions).items()}
    timings = time_in_turn(timers, choose_rounds)
    held = held_by_provider(operation, case, tensors, providers)
    return [make_row(case, operation, name, timing, source, **held.get(name, {})) for name, timing in timings.items()]


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
