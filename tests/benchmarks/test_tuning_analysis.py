"""What is counted and compared, on an imagined study."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tuning_canned import SETTINGS, curve, imagined_study, trial

from studies.tuning.analysis import cells, conclusion, effects, move_medians, pairs, sides, trials
from studies.tuning.results import Results
from studies.tuning.settings import ALPHAS, BETAS, SEEDS, Point, Settings


def test_grid_is_complete_and_without_duplicates() -> None:
    points = Settings().points
    assert len(points) == len(set(points))
    grid = {(p.alpha, p.beta, p.batch_norm, p.seed) for p in points if p.beta in BETAS}
    assert grid == {(a, b, n, s) for a in ALPHAS for b in BETAS for n in (False, True) for s in SEEDS}
    # Beside the grid only the end of the one move that is not in it.
    assert {p.beta for p in points} - set(BETAS) == {0.9005}
    assert len(points) == 5 * 8 * 2 * 3


@pytest.mark.parametrize("steps", [1, 7, 300, 2000])
def test_evaluations_end_with_the_last_step(steps: int) -> None:
    found = Settings(steps=steps).evaluations
    assert found == sorted(set(found))
    assert found[0] >= 1
    assert found[-1] == steps
    assert len(found) <= 36


def test_a_diverged_trial_has_no_accuracy_from_there_on() -> None:
    found = trials(Results.of(SETTINGS, [], [trial(Point(1.0, 0.9, False, 0), [20, 30])])).iloc[0]
    assert found["curve"].tolist() == [20, 30, 0, 0]
    assert (found["final"], found["diverged_at"]) == (0, 3)


def test_sides_count_the_grid_alone() -> None:
    without, with_it = sides(imagined_study()).itertuples()
    assert (without.trials, without.at_goal, without.reached, without.diverged) == (8, 4, 4, 4)
    assert (with_it.trials, with_it.at_goal, with_it.reached, with_it.diverged) == (8, 8, 8, 0)
    assert (without.steps, without.fewest, with_it.steps, with_it.fewest) == (3, 3, 2, 2)
    assert (without.best, without.at, with_it.best) == (92.0, "0.1, 0.9", 97.5)
    assert cells(imagined_study()).loc[(False, 1.0, 0.9)].tolist() == [0.0, True]


def test_who_reached_the_goal_and_lost_it_does_not_train() -> None:
    points = [Point(0.1, 0.9, False, seed) for seed in (0, 1)]
    results = Results.of(SETTINGS, [], [trial(points[0], [50, 95, 96, 60]), trial(points[1], [50, 60, 80, 90])])
    found = sides(results).loc[False]
    assert (found["at_goal"], found["reached"]) == (1, 2)


def test_pairs_are_of_trials_that_both_train() -> None:
    both = pairs(imagined_study())
    assert both[["alpha", "beta", "seed"]].to_numpy().tolist() == [[0.1, b, s] for b in (0.9, 0.999) for s in (0, 1)]
    assert both[["steps_without", "steps_with"]].median().tolist() == [3, 2]
    assert both[["travel_without", "travel_with"]].median().tolist() == [3.0, 1.0]


def test_effect_of_a_move_is_between_equal_seeds() -> None:
    found = effects(imagined_study()).set_index(["start", "end", "alpha", "batch_norm"])
    # 40 points in two of four evaluations; two seeds differ by 2 points in one.
    assert found.loc[(0.999, 0.9995, 0.1, False)].tolist() == [20, 0.5]
    assert found.loc[(0.9, 0.9005, 0.1, False)].tolist() == [0, 0.5]
    # Over two α, without and with: 20, 0, 0, 0 beside 0.5, 0, 0.25, 0.25.
    assert move_medians(imagined_study()).to_numpy().tolist() == [[0.0, 0.25], [0.0, 0.25]]


def test_conclusion_falls_the_way_the_numbers_do() -> None:
    results = imagined_study()
    first, second, third = conclusion(results)
    assert "widens the range" in first
    assert "8 of 8 trials end at ≥ 90 % with it, 4 of 8 without" in first
    assert "best accuracy 97.5 % and 92.0 %" in first
    assert "where both train 2 and 3 (median)" in first
    assert "stiller" in second
    assert "1.0 widths (15th to 85th percentile) with it, 3.0 without" in second
    assert "4 of 4 pairs" in second
    assert "0.9 to 0.9005 changes almost nothing (0.00 points of accuracy; another seed 0.25)" in third
    assert "0.999 to 0.9995 changes almost nothing (0.00 points" in third

    def swapped(point: Point) -> Point:
        return replace(point, batch_norm=not point.batch_norm)

    turned = [trial(swapped(p), curve(p), travel=1.0 if p.batch_norm else 3.0) for p in SETTINGS.points]
    first, second, _ = conclusion(Results.of(SETTINGS, [], turned))
    assert "does not widen the range" in first
    assert "less still" in second


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (49, "changes almost nothing (0.50 points of accuracy; another seed 5.00)"),
        (41, "changes less than another seed (4.50 points of accuracy; another seed 5.00)"),
        (30, "changes a lot (10.00 points of accuracy; another seed 5.00)"),
    ],
)
def test_a_move_is_measured_by_what_another_seed_does(start: int, said: str) -> None:
    """Two of four evaluations move, by 50 - start points; at β = 0.999 the seeds differ by 20 in one."""

    def moved(point: Point) -> list[int]:
        first = start if point.beta == 0.9995 else 50
        return [first, first, 95 - 20 * point.seed, 99]

    line = conclusion(Results.of(SETTINGS, [], [trial(p, moved(p)) for p in SETTINGS.points]))[2]
    assert f"from 0.999 to 0.9995 {said}" in line
