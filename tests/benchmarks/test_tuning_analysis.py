"""What is counted and compared, on an imagined study."""

from __future__ import annotations

import pytest
from tuning_canned import SETTINGS, imagined_study, trial

from studies.tuning.analysis import cells, conclusion, effects, pairs, sides, trials
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


def test_conclusion_has_a_line_for_each_claim() -> None:
    assert conclusion(imagined_study()) == [
        "8 of 8 trials end at ≥ 90 % with batch norm, 4 of 8 without; best accuracy 97.5 % and 92.0 %; steps to 90 % "
        "where both train 2 and 3 (median).",
        "Where both train, the medians of the last hidden layer's inputs travel 1.0 widths (15th to 85th percentile) "
        "with batch norm, 3.0 without; the shorter way is batch norm's in 4 of 4 pairs.",
        # Over two α, without and with: 20, 0, 0, 0 beside 0.5, 0, 0.25, 0.25.
        "β from 0.9 to 0.9005 changes 0.00 points of accuracy (another seed 0.25), from 0.999 to 0.9995 changes 0.00 "
        "points of accuracy (another seed 0.25); medians over α without and with batch norm.",  # noqa: RUF001
    ]
