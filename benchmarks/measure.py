"""The run: every case is checked, then its operations are timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from timeit import Timer
from typing import Any

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import MismatchError, check_case
from benchmarks.operations import Tensors, make_tensors, operation_calls
from benchmarks.provenance import provenance
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


def measure(
    cases: Sequence[Case],
    outcome: Outcome,
    progress: Progress,
    seconds: float,
    rounds: int | None = None,
    threads: int | None = None,
) -> None:
    """Check and time the cases within about ``seconds``, or with a fixed number of rounds.

    A case that disagrees with torch gets no number, but an entry in ``outcome.mismatches``. ``threads=None``
    takes torch's own number.
    """
    with set_torch_threads(threads or torch.get_num_threads()):
        source = provenance(torch.get_num_threads())
        warm_memory()
        budget = Budget(seconds, sum(map(case_work, cases)), rounds)
        for case in cases:
            progress(f"{case} check", 0)
            tensors = make_tensors(case)
            try:
                check_case(case, tensors)
            except MismatchError as error:
                outcome.mismatches.append(str(error))
                budget.skip(case_work(case))
                progress(f"{case} check", case_work(case))
                continue
            budget.skip(check_work(case))
            progress(f"{case} check", check_work(case))
            for operation in case.operations:
                progress(f"{case} {operation}", 0)
                outcome.rows += time_operation(operation, case, tensors, budget, source)
                progress(f"{case} {operation}", estimated_work(operation, case))


def time_operation(operation: str, case: Case, tensors: Tensors, budget: Budget, source: Provenance) -> list[Row]:
    """One row a provider."""
    choose_rounds = partial(budget.rounds, estimated_work(operation, case))
    timers = {name: Timer(call) for name, call in operation_calls(operation, tensors).items()}
    timings = time_in_turn(timers, choose_rounds)
    return [make_row(case, operation, provider, timing, source) for provider, timing in timings.items()]


def make_row(case: Case, operation: str, provider: str, timing: Timing, source: Provenance, **details: Any) -> Row:
    """``details``: fields of Measurement that have a default."""
    moved = model_bytes(operation, case.shape, case.dtype)
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
        **details,
        **asdict(source),
    )
