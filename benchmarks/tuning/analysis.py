"""What the trials say: who trains, how fast, how still the inputs are held, what a move of β changes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

from benchmarks.tuning.results import Results, Trial
from benchmarks.tuning.settings import Point

GOAL = 90.0  # percent of the test images


def accuracies(results: Results, trial: Trial) -> list[float]:
    """Percent at each evaluation; 0 from where it diverged, as what is not finite names no class."""
    found = [100 * correct / trial.tests for correct in trial.correct]
    return found + [0.0] * (len(results.settings.evaluations) - len(found))


def final_accuracy(results: Results, trial: Trial) -> float:
    return accuracies(results, trial)[-1]


def steps_to_goal(results: Results, trial: Trial) -> int | None:
    """The first evaluation at which it has reached the goal."""
    found = zip(results.settings.evaluations, accuracies(results, trial), strict=True)
    return next((step for step, accuracy in found if accuracy >= GOAL), None)


def grid_trials(results: Results, batch_norm: bool) -> list[Trial]:
    """One side's, without those that are tried for a move of β alone."""
    betas = results.settings.betas
    return [trial for trial in results.trials if trial.point.batch_norm == batch_norm and trial.point.beta in betas]


def of_seeds(results: Results, alpha: float, beta: float, batch_norm: bool) -> list[Trial]:
    points = (Point(alpha, beta, batch_norm, seed) for seed in results.settings.seeds)
    return [trial for point in points if (trial := results.at(point)) is not None]


def cell(results: Results, alpha: float, beta: float, batch_norm: bool) -> float | None:
    """Mean final accuracy over the seeds; None where nothing was measured."""
    found = of_seeds(results, alpha, beta, batch_norm)
    return fmean(final_accuracy(results, trial) for trial in found) if found else None


@dataclass(frozen=True)
class Best:
    alpha: float
    beta: float
    accuracy: float  # mean over the seeds


def best(results: Results, batch_norm: bool) -> Best | None:
    """The grid's best pair of α and β, the seeds together."""
    settings = results.settings
    cells = [
        Best(alpha, beta, accuracy)
        for alpha in settings.alphas
        for beta in settings.betas
        if (accuracy := cell(results, alpha, beta, batch_norm)) is not None
    ]
    return max(cells, key=lambda found: found.accuracy, default=None)


@dataclass(frozen=True)
class Side:
    """The grid with batch norm, or without it."""

    batch_norm: bool
    trials: int
    at_goal: int  # at the end
    reached: int  # at some time
    diverged: int
    best: Best | None
    steps: float | None  # to the goal; median of those that reached it
    fewest_steps: int | None

    @property
    def share(self) -> float:
        return self.at_goal / self.trials if self.trials else 0.0


def side(results: Results, batch_norm: bool) -> Side:
    trials = grid_trials(results, batch_norm)
    steps = [found for trial in trials if (found := steps_to_goal(results, trial)) is not None]
    return Side(
        batch_norm=batch_norm,
        trials=len(trials),
        at_goal=sum(final_accuracy(results, trial) >= GOAL for trial in trials),
        reached=len(steps),
        diverged=sum(trial.diverged_at is not None for trial in trials),
        best=best(results, batch_norm),
        steps=median(steps) if steps else None,
        fewest_steps=min(steps, default=None),
    )


@dataclass(frozen=True)
class Pairs:
    """Trials that train with batch norm and without it, by (without, with): the same α, β and seed."""

    count: int
    steps: tuple[float, float]  # to the goal, median
    travel: tuple[float, float]  # of the medians of the last hidden layer's inputs, in widths, median
    stiller: int  # how many have the shorter way with batch norm


def pairs(results: Results) -> Pairs | None:
    both = []
    for trial in grid_trials(results, batch_norm=False):
        point = trial.point
        other = results.at(Point(point.alpha, point.beta, True, point.seed))
        if other is not None and min(final_accuracy(results, t) for t in (trial, other)) >= GOAL:
            both.append((trial, other))
    if not both:
        return None
    steps = [tuple(steps_to_goal(results, trial) or 0 for trial in pair) for pair in both]
    ways = [tuple(trial.travel or 0.0 for trial in pair) for pair in both]
    return Pairs(len(both), _medians(steps), _medians(ways), sum(way[1] < way[0] for way in ways))


def _medians(pairs: Iterable[Sequence[float]]) -> tuple[float, float]:
    without, with_it = zip(*pairs, strict=True)
    return median(without), median(with_it)


@dataclass(frozen=True)
class Effect:
    """What a move of β does at one α, in points of accuracy, mean over the evaluations."""

    move: tuple[float, float]
    alpha: float
    batch_norm: bool
    change: float  # between the two β of the same seed, mean over the seeds
    spread: float | None  # between two seeds at the first β, mean over the pairs


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    return fmean(abs(a - b) for a, b in zip(first, second, strict=True))


def effects(results: Results) -> list[Effect]:
    found = []
    for move in results.settings.moves:
        for batch_norm in (False, True):
            for alpha in results.settings.alphas:
                before, after = (of_seeds(results, alpha, beta, batch_norm) for beta in move)
                curves = {trial.point.seed: accuracies(results, trial) for trial in before}
                changes = [
                    distance(curves[trial.point.seed], accuracies(results, trial))
                    for trial in after
                    if trial.point.seed in curves
                ]
                spreads = [distance(*pair) for pair in combinations(curves.values(), 2)]
                if changes:
                    spread = fmean(spreads) if spreads else None
                    found.append(Effect(move, alpha, batch_norm, fmean(changes), spread))
    return found


@dataclass(frozen=True)
class MoveMedian:
    """A move's effect, median over α without and with batch norm: at the edge of what trains, anything moves a lot."""

    change: float
    spread: float | None


def move_median(found: Sequence[Effect], move: tuple[float, float]) -> MoveMedian | None:
    chosen = [e for e in found if e.move == move]
    if not chosen:
        return None
    spreads = [e.spread for e in chosen if e.spread is not None]
    return MoveMedian(median(e.change for e in chosen), median(spreads) if spreads else None)
