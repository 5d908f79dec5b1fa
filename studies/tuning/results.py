"""The measurements: a trial's curves, and a study's trials as one JSON file with a trial a line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import InputError, read_json, write_atomically
from studies.tuning.settings import Point, Settings

# Significant digits that are kept.
DIGITS = 4
PERCENTILE_DIGITS = 3  # only used for a picture


@dataclass(frozen=True)
class Trial:
    """The curves have one value an evaluation; those of a diverged trial end before it diverged."""

    point: Point
    diverged_at: int | None  # the step of the first loss or output that was not finite
    loss: list[float]  # mean over the training batches since the evaluation before
    correct: list[int]  # test images
    tests: int  # how many there are
    percentiles: list[list[float]]  # the 15th, 50th and 85th of the input of the last hidden layer's first unit
    travel: float | None  # of that layer's medians, in widths: training.travel
    cpu_s: float

    def to_json(self) -> dict[str, Any]:
        """Fields of the point that have their default are left out."""
        rest = asdict(self)
        point = rest.pop("point")
        return {**{f.name: point[f.name] for f in fields(Point) if point[f.name] != f.default}, **rest}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Trial":
        rest = dict(content)
        point = Point(**{f.name: rest.pop(f.name) for f in fields(Point) if f.name in rest})
        return Trial(point=point, **rest)

    def rounded(self) -> "Trial":
        return replace(
            self,
            loss=_rounded(self.loss),
            percentiles=[_rounded(curve, PERCENTILE_DIGITS) for curve in self.percentiles],
            travel=None if self.travel is None else _rounded([self.travel])[0],
            cpu_s=round(self.cpu_s, 2),
        )


def _rounded(values: Sequence[float], digits: int = DIGITS) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


@dataclass(frozen=True)
class Results:
    """The results of one study. Trials are sorted and rounded, so that a file and a storage give the same report."""

    settings: Settings
    machines: list[dict[str, Any]]  # rows.Provenance of each kind of machine that took part
    trials: list[Trial]

    @staticmethod
    def of(settings: Settings, machines: Sequence[dict[str, Any]], trials: Sequence[Trial]) -> "Results":
        ordered = sorted(trials, key=lambda trial: trial.point)
        return Results(settings, list(machines), [trial.rounded() for trial in ordered])


def save_results(path: Path, results: Results) -> None:
    trials = ",\n".join(json.dumps(trial.to_json(), separators=(",", ":")) for trial in results.trials)
    settings, machines = json.dumps(asdict(results.settings)), json.dumps(results.machines)
    text = f'{{\n"settings": {settings},\n"machines": {machines},\n"trials": [\n{trials}\n]\n}}\n'
    write_atomically(path, text.encode())


def load_results(path: Path) -> Results:
    """The results of a file; raises InputError where it is not one of ours."""
    content = read_json(path)
    try:
        settings = {name: tuple(v) if isinstance(v, list) else v for name, v in content["settings"].items()}
        return Results.of(
            Settings(**settings), content["machines"], [Trial.from_json(trial) for trial in content["trials"]]
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path} holds no results of a tuning study: {error!r}") from None
