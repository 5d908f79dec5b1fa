"""An imagined study, with accuracies that are easy to compute with."""

from typing import Any

from canned import ROW

from studies.tuning.results import Results, Trial
from studies.tuning.settings import Point, Settings

# Evaluated after each of its steps.
SETTINGS = Settings(steps=4, alphas=(0.1, 1.0), betas=(0.9, 0.999), seeds=(0, 1))
TESTS = 100
MACHINE = {name: ROW[name] for name in ("device_name", "isa", "torch_version", "bnext_version", "commit", "date")}


def trial(point: Point, correct: list[int], **changes: Any) -> Trial:
    fields: dict[str, Any] = {
        "diverged_at": None if len(correct) == SETTINGS.steps else len(correct) + 1,
        "loss": [1 / (1 + value) for value in correct],
        "percentiles": [[shift + value / 7 for value in correct] for shift in (-1.0, 0.0, 1.0)],
        "travel": 1.0 if point.batch_norm else 3.0,
        "cpu_s": 0.25,
    }
    return Trial(point=point, correct=correct, tests=TESTS, **{**fields, **changes})


def curve(point: Point) -> list[int]:
    """With batch norm everything trains, and no curve depends on β. Without it α = 1 diverges, and the second move of β
    takes 40 points from the first half of the curve."""
    if point.batch_norm:
        return [50, 95, 96, 97 + point.seed]
    if point.alpha == 1.0:
        return [20, 30]
    start = 10 if point.beta == 0.9995 else 50
    return [start, start, 92, 91 + 2 * point.seed]


def imagined_study() -> Results:
    return Results.of(SETTINGS, [MACHINE], [trial(point, curve(point)) for point in SETTINGS.points])
