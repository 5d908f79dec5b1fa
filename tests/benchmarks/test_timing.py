"""Percentiles, budgets and rounds of ``python -m benchmarks``, by clocks that the tests set."""

import itertools
import timeit

import pytest

from benchmarks import timing
from benchmarks.suites import Case, select_cases
from benchmarks.timing import Budget, calibrate, check_work, operation_work, summarise, time_in_turn


def test_percentiles_are_interpolated() -> None:
    found = summarise([6.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.p20_s, found.median_s, found.p80_s) == pytest.approx((2.0, 3.5, 5.0))
    assert found.rounds == 6


def test_budget_shares_what_is_left_by_work() -> None:
    now = 0.0
    budget = Budget(100.0, work=15.0, clock=lambda: now)
    budget.done(5.0)
    assert budget.rounds(work=2.0, round_s=1.0) == 20
    budget.done(2.0)
    now = 23.0  # 3 seconds later than planned: 77 seconds are left for 8 units
    assert budget.rounds(work=4.0, round_s=2.0) == 19


def test_rounds_are_limited_or_fixed_even_if_the_budget_is_spent() -> None:
    assert Budget(1000.0, work=1.0).rounds(1.0, 1e-3) == timing.MAX_ROUNDS
    assert Budget(1000.0, work=1.0, rounds=3).rounds(1.0, 1e-3) == 3
    assert Budget(0.0, work=1.0).rounds(1.0, 10.0) == timing.MIN_ROUNDS
    assert Budget(0.0, work=1.0).rounds(1.0, 1e-3) == timing.GOOD_ROUNDS


def test_work_grows_with_bytes_and_compiling() -> None:
    small = Case("2d", (4, 8), "float32", "contiguous", ("forward",), ("torch", "bnext"))
    compiled = Case("2d", (4, 8), "float32", "contiguous", ("forward",), ("torch", "bnext", "torch-compile"))
    large = Case("2d", (4096, 512), "float32", "contiguous", ("forward",), ("torch", "bnext"))
    assert check_work(compiled, "cpu") - check_work(small, "cpu") == timing.COMPILE_S["cpu"]
    assert operation_work("forward", large, "cpu") > operation_work("forward", small, "cpu")
    five, three = (select_cases(["training"], with_compile=compiles)[0] for compiles in (True, False))
    assert check_work(five, "cpu") - check_work(three, "cpu") > 2 * 25


def test_a_round_is_long_enough_and_a_long_call_is_one() -> None:
    number, seconds = calibrate(timeit.Timer(lambda: None))
    assert number > 1
    assert seconds >= timing.MIN_ROUND_S
    calls: list[int] = []
    timer = timeit.Timer(lambda: calls.append(1), timer=itertools.count(step=1.0).__next__)
    assert calibrate(timer) == (1, 1.0)
    assert len(calls) == 1


class Clocked:
    """A stopwatch of a call that takes a given time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def timeit(self, number: int) -> float:
        self.calls += number
        return number * self.seconds


def test_every_call_is_timed_in_every_round_and_has_its_own_time() -> None:
    stopwatches = {"fast": Clocked(1e-5), "slow": Clocked(4e-5)}
    seen: list[float] = []
    timings = time_in_turn(stopwatches, lambda round_s: seen.append(round_s) or 4)  # type: ignore[func-returns-value]
    assert {name: found.median_s for name, found in timings.items()} == pytest.approx({"fast": 1e-5, "slow": 4e-5})
    assert {found.rounds for found in timings.values()} == {4}
    assert len(seen) == 1
    assert seen[0] >= 2 * timing.MIN_ROUND_S
    assert all(watch.calls * watch.seconds >= 5 * timing.MIN_ROUND_S for watch in stopwatches.values())
