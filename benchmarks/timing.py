"""How calls are timed: in turn, in one process, in rounds, within a budget."""

import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.suites import COMPILE, SUITES, Case
from benchmarks.traffic import model_bytes, tensor_bytes

Call = Callable[[], object]
Stopwatch = Any  # times a call by some clock, as timeit.Timer does: timeit(number) takes so many seconds


MIN_ROUND_S = 2e-3  # so that the overhead of clock and loop is negligible
MIN_ROUNDS = 6
GOOD_ROUNDS = 9  # with these the median is robust to an outlier on each side
GOOD_ROUNDS_S = 0.5  # GOOD_ROUNDS are always run if they take no longer than this
MAX_ROUNDS = 25


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the rounds."""

    median_s: float
    p20_s: float
    p80_s: float
    rounds: int


def summarise(seconds: list[float]) -> Timing:
    """Median, 20th and 80th percentile, interpolated linearly."""
    p20, median, p80 = (float(value) for value in np.quantile(seconds, (0.2, 0.5, 0.8)))
    return Timing(median, p20, p80, len(seconds))


class Budget:
    """Divides the time that is left among the remaining measurements, in proportion to their work.

    Time that a measurement does not use goes to later ones. ``rounds`` fixes the number of rounds instead.
    """

    def __init__(
        self, seconds: float, work: float, rounds: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._work_left = work
        self._rounds = rounds

    def rounds(self, work: float, round_s: float) -> int:
        """The number of rounds for the next measurement, of which one round takes ``round_s`` seconds."""
        if self._rounds is not None:
            return self._rounds
        share = max(self._end - self._clock(), 0.0) * work / max(self._work_left, work)
        fewest = GOOD_ROUNDS if GOOD_ROUNDS * round_s <= GOOD_ROUNDS_S else MIN_ROUNDS
        return min(max(int(share / round_s), fewest), MAX_ROUNDS)

    def done(self, work: float) -> None:
        """Count work as done, or left out."""
        self._work_left -= work


# Work, in which the time budget and the progress bar are divided, is in seconds, roughly. A second of a CPU moves so
# many bytes, and a small tensor takes a tenth of a second, as a round has a shortest length; on a GPU each takes a
# second. All operations of models in a suite are timed for equally long.
SECOND_BYTES = 100_000_000
SHORTEST_S = 0.1
COMPILE_S = {"cpu": 4.0, "cuda": 10.0}  # of a batch norm: forward, backward and evaluation
CHECK_PASSES = 2  # making and checking a tensor takes about as long as timing so many passes over it


def operation_work(operation: str, case: Case, device: str) -> float:
    if case.model:
        return 2.0 * len(case.providers)
    if device == "cuda":
        return 1.0
    return SHORTEST_S + model_bytes(operation, case.shape, case.dtype, case.epilogue) / SECOND_BYTES


def check_work(case: Case, device: str) -> float:
    """The work of making tensors and models, compiling, comparing results, and measuring memory."""
    compiled = sum(name.endswith(COMPILE) for name in case.providers)
    if case.model:
        suite = SUITES[device][case.suite]
        return suite.compile_s * compiled + (1 + suite.peak_s) * len(case.providers)
    tensors = 1.0 if device == "cuda" else CHECK_PASSES * tensor_bytes(case.shape, case.dtype) / SECOND_BYTES
    return COMPILE_S[device] * compiled + tensors


def calibrate(timer: Stopwatch) -> tuple[int, float]:
    """The number of calls that fill a round, and the seconds they take; the calls warm up."""
    first = timer.timeit(1)
    if first > 25 * MIN_ROUND_S:  # work that only a first call does is negligible
        return 1, first
    number = 1
    while (seconds := timer.timeit(number)) < MIN_ROUND_S:
        number = max(2 * number, int(1.2 * number * MIN_ROUND_S / max(seconds, 1e-9)))
    return number, seconds


def time_in_turn(timers: Mapping[str, Stopwatch], choose_rounds: Callable[[float], int]) -> dict[str, Timing]:
    """Time each call once a round; ``choose_rounds`` is called with the seconds that a round takes.

    The order within a round is random, with a seed: a call finds in the cache what the call before it left, so no call
    should always follow the same one. A call's result is freed inside the timed loop, as in a user's program.
    (torch.utils.benchmark.Timer makes two warm-up calls each time: in rounds of one call, as large shapes have, these
    would triple the time.)
    """
    sizes = {name: calibrate(timer) for name, timer in timers.items()}
    rounds = choose_rounds(sum(seconds for _, seconds in sizes.values()))
    order = list(timers)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in itertools.repeat(None, rounds):
        shuffle(order)
        for name in order:
            number = sizes[name][0]
            seconds[name].append(timers[name].timeit(number) / number)
    return {name: summarise(values) for name, values in seconds.items()}
