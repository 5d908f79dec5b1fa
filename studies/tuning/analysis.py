"""The analysis of the trials: which train, how fast, how stable the inputs are, what a move of β changes."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations, product

import numpy as np
import pandas as pd

from benchmarks.tables import Sheet, markdown, texts
from studies.tuning.results import Results
from studies.tuning.settings import Point

GOAL = 90.0  # percent of the test images


def trials(results: Results) -> pd.DataFrame:
    """One line per trial: its point, ``curve`` with the percentage at each evaluation, the last of them as ``final``.

    ``curve`` is 0 from where a trial diverged, as outputs that are not finite name no class. ``steps``: to the goal.
    """
    evaluations = results.settings.evaluations
    lines = []
    for trial in results.trials:
        curve = np.zeros(len(evaluations))
        curve[: len(trial.correct)] = [100 * correct / trial.tests for correct in trial.correct]
        steps = next((step for step, value in zip(evaluations, curve, strict=True) if value >= GOAL), None)
        measured = {"curve": curve, "final": curve[-1], "steps": steps}
        lines.append({**asdict(trial.point), **measured, "diverged_at": trial.diverged_at, "travel": trial.travel})
    columns = [*Point.__dataclass_fields__, "curve", "final", "steps", "diverged_at", "travel"]
    kinds = {"batch_norm": bool, "final": float, "steps": float, "diverged_at": float, "travel": float}
    return pd.DataFrame(lines, columns=columns).astype(kinds)


def grid(results: Results) -> pd.DataFrame:
    """The trials of the grid, without those of a β that is tried only for a move."""
    table = trials(results)
    return table[table["beta"].isin(results.settings.betas)]


def cells(results: Results) -> pd.DataFrame:
    """One line per batch_norm, α and β of the grid: the mean of ``final`` over the seeds; whether one ``diverged``."""
    found = grid(results).groupby(["batch_norm", "alpha", "beta"])
    return found.agg(accuracy=("final", "mean"), diverged=("diverged_at", lambda steps: steps.notna().any()))


def sides(results: Results) -> pd.DataFrame:
    """The grid's results without batch norm and with it. ``best`` is the accuracy of the best pair of α and β."""
    found = grid(results).groupby("batch_norm")
    table = found.agg(
        trials=("final", "size"),
        at_goal=("final", lambda final: (final >= GOAL).sum()),
        reached=("steps", "count"),
        diverged=("diverged_at", "count"),
        steps=("steps", "median"),
        fewest=("steps", "min"),
    ).reindex([False, True])
    counts = ["trials", "at_goal", "reached", "diverged"]
    table[counts] = table[counts].fillna(0).astype(int)
    accuracies = cells(results)["accuracy"]
    best = {where[0]: where for where in accuracies.groupby("batch_norm").idxmax()}
    table["best"] = [accuracies[best[side]] if side in best else np.nan for side in table.index]
    table["at"] = [f"{best[side][1]:g}, {best[side][2]:g}" if side in best else "" for side in table.index]
    return table


def sides_sheet(results: Results) -> Sheet:
    table = sides(results)
    share = table["at_goal"] / table["trials"].clip(lower=1)
    lines = {
        "": ["without", "with batch norm"],
        f"≥ {GOAL:g} % at the end": [f"{a} of {b}" for a, b in zip(table["at_goal"], table["trials"], strict=True)],
        "of the grid": texts(100 * share, "{:.0f} %"),
        "at some time": texts(table["reached"], "{}"),
        "diverged": texts(table["diverged"], "{}"),
        "best": texts(table["best"], "{:.1f} %"),
        "at α, β": table["at"].tolist(),
        f"steps to {GOAL:g} %": texts(table["steps"], "{:.0f}"),
        "fewest": texts(table["fewest"], "{:.0f}"),
    }
    return Sheet(pd.DataFrame(lines), labels=1)


def pairs(results: Results) -> pd.DataFrame:
    """The trials that train with batch norm and without it, at the same α, β and seed, beside each other."""
    trained = grid(results).query("final >= @GOAL")
    sides = (trained.query("not batch_norm"), trained.query("batch_norm"))
    return pd.merge(*sides, on=["alpha", "beta", "seed"], suffixes=("_without", "_with"))


def effects(results: Results) -> pd.DataFrame:
    """The effect of a move of β at an α, in points of accuracy, as the mean over the evaluations.

    ``change``: between the two β of the same seed, mean over the seeds. ``spread``: between two seeds at the first β,
    mean over the pairs.
    """
    groups = trials(results).groupby(["batch_norm", "alpha"])
    lines = []
    for move, ((side, alpha), group) in product(results.settings.moves, groups):
        before, after = (group[group["beta"] == beta].set_index("seed")["curve"] for beta in move)
        changes = [np.abs(a - b).mean() for a, b in zip(*before.align(after, join="inner"), strict=True)]
        spreads = [np.abs(a - b).mean() for a, b in combinations(before, 2)]
        if changes:
            lines.append((*move, alpha, side, np.mean(changes), np.mean(spreads) if spreads else np.nan))
    return pd.DataFrame(lines, columns=["start", "end", "alpha", "batch_norm", "change", "spread"])


def moves_sheet(results: Results) -> Sheet:
    """One line per move and α: the change without and with batch norm, each beside the change by another seed."""
    lines = []
    for (start, end, alpha), members in effects(results).groupby(["start", "end", "alpha"]):
        found = members.set_index("batch_norm")[["change", "spread"]].reindex([False, True])
        lines.append([f"{start:g} → {end:g}", f"{alpha:g}", *texts(found.to_numpy().flatten(), "{:.2f}")])
    heads = ["β", "α", "without", "its seeds", "with", "its seeds"]
    return Sheet(pd.DataFrame(lines, columns=heads), labels=1)


def conclusion(results: Results) -> list[str]:
    """A line for each of the text's claims: the range that trains, the inputs held still, the moves of β."""
    without, with_it = sides(results).itertuples()
    both = pairs(results)
    steps, ways = (both[[f"{what}_with", f"{what}_without"]] for what in ("steps", "travel"))
    fast, slow = steps.median()
    still, moving = ways.median()
    shorter = (ways["travel_with"] < ways["travel_without"]).sum()
    # Medians over α, without and with batch norm, since at the edge of what trains any change moves a lot.
    medians = effects(results).groupby(["start", "end"])[["change", "spread"]].median()
    moves = [
        f"{start:g} to {end:g} changes {change:.2f} points of accuracy (another seed {spread:.2f})"
        for (start, end), change, spread in medians.itertuples()
    ]
    return [
        f"{with_it.at_goal} of {with_it.trials} trials end at ≥ {GOAL:g} % with batch norm, {without.at_goal} of "
        f"{without.trials} without; best accuracy {with_it.best:.1f} % and {without.best:.1f} %; steps to {GOAL:g} % "
        f"where both train {fast:.0f} and {slow:.0f} (median).",
        f"Where both train, the medians of the last hidden layer's inputs travel {still:.1f} widths (15th to 85th "
        f"percentile) with batch norm, {moving:.1f} without; the shorter way is batch norm's in {shorter} of "
        f"{len(ways)} pairs.",
        f"β from {', from '.join(moves)}; medians over α without and with batch norm.",
    ]


def how_measured(results: Results) -> str:
    settings = results.settings
    what = (
        f"three layers of 100 sigmoids, {settings.optimizer}, initialisation {', '.join(settings.inits)}, "
        f"{settings.steps} steps, {len(settings.seeds)} seeds, {len(results.trials)} of {len(settings.points)} trials"
    )
    machines = [
        f"{machine['device_name']} ({machine['isa']}), torch {machine['torch_version']}, "
        f"bnext {machine['bnext_version']}, commit {machine['commit']}, {machine['date'][:10]}"
        for machine in results.machines
    ]
    minutes = sum(trial.cpu_s for trial in results.trials) / 60
    return f"scikit-learn's digits, {what}; {'; '.join(machines)}; {minutes:.1f} minutes of one core."


def block(results: Results) -> str:
    """The conclusion, for a document."""
    return "\n".join(f"* {line}" for line in conclusion(results))


def page(results: Results, pictures: Mapping[str, str]) -> str:
    """The results' own page, with each picture's file and caption."""
    parts = [
        "# Tuning by grid search, with batch norm and without",
        block(results),
        markdown(sides_sheet(results)),
        "Trials of a β that is not the grid's, tried for a move, do not count here. Best: mean over the seeds at that "
        "α and β; steps: the median of those that got there.",
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items()),
        "What a move of β changes, in points of accuracy, mean over the evaluations and seeds; beside it what another "
        "seed changes at the first β:",
        markdown(moves_sheet(results)),
        f"Measured by `python -m benchmarks tuning`: {how_measured(results)}",
    ]
    return "\n\n".join(parts) + "\n"
