"""The pictures: heat maps of accuracy, loss curves, the percentiles of a unit's input, the effect of the moves of β."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.style import BLACK, BLUE, LABEL, NUMBER, ORANGE, TITLE, panels
from studies.tuning.analysis import GOAL, cells, effects
from studies.tuning.results import Results, Trial

SIDES = {False: "without batch norm", True: "with batch norm"}
COLOURS = {False: ORANGE, True: BLUE}
LOSS_RANGE = (1e-4, 30)
CHANGE_RANGE = (0.01, 100)
USUAL_BETA = 0.9


def heat_maps(results: Results) -> Figure:
    """Mean final accuracy over α × β; a cross where a seed diverged, bold where the goal is reached."""
    settings = results.settings
    table = cells(results)
    figure, ((*grid,),) = panels(3.4, columns=2, sharey=True)
    for (batch_norm, title), axes in zip(SIDES.items(), grid, strict=True):
        found = [
            [table["accuracy"].get((batch_norm, alpha, beta), float("nan")) for beta in settings.betas]
            for alpha in settings.alphas
        ]
        image = axes.imshow(found, vmin=0, vmax=100, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(settings.betas)), [f"{beta:g}" for beta in settings.betas], fontsize=NUMBER)
        axes.set_yticks(range(len(settings.alphas)), [f"{alpha:g}" for alpha in settings.alphas], fontsize=NUMBER)
        axes.set_xlabel("β of the optimiser")
        axes.set_title(title, fontsize=TITLE)
        for (side, alpha, beta), value, crossed in table.itertuples():
            if side == batch_norm:
                text = f"{value:.0f}{' ×' if crossed else ''}"
                weight = "bold" if value >= GOAL else "normal"
                place = settings.betas.index(beta), settings.alphas.index(alpha)
                style = {"ha": "center", "va": "center", "fontsize": LABEL, "weight": weight}
                axes.text(*place, text, color="black" if value > 60 else "white", **style)
    grid[0].set_ylabel("learning rate α")
    figure.colorbar(image, ax=grid, label="test accuracy, %", shrink=0.9)
    return figure


def of_seeds(results: Results, alpha: float, beta: float, batch_norm: bool) -> list[Trial]:
    return [t for t in results.trials if (t.point.alpha, t.point.beta, t.point.batch_norm) == (alpha, beta, batch_norm)]


def losses(results: Results) -> Figure:
    """One colour per α, one thin line per seed, at the β of the grid next to 0.9."""
    settings = results.settings
    beta = min(settings.betas, key=lambda value: abs(value - USUAL_BETA))
    figure, ((*grid,),) = panels(3.6, columns=2, sharey=True, sharex=True)
    shades = mpl.colormaps["viridis"].resampled(len(settings.alphas) + 1)
    for (batch_norm, title), axes in zip(SIDES.items(), grid, strict=True):
        for number, alpha in enumerate(settings.alphas):
            for first, trial in enumerate(of_seeds(results, alpha, beta, batch_norm)):
                label = f"α = {alpha:g}" if first == 0 else None
                _curve(axes, results, trial, trial.loss, color=shades(number), label=label, linewidth=0.9)
        axes.set_yscale("log")
        axes.set_ylim(*LOSS_RANGE)
        axes.set_title(f"{title}, β = {beta:g}", fontsize=TITLE)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("training loss")
    _legend(grid[1])
    return figure


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=NUMBER)


def _curve(axes: Axes, results: Results, trial: Trial, values: Sequence[float], **style: Any) -> None:
    """Draw a curve over the steps, with a cross at the end of a trial that diverged."""
    steps = results.settings.evaluations[: len(values)]
    (line,) = axes.plot(steps, values, **style)
    if trial.diverged_at is not None and values:
        axes.plot(steps[-1:], values[-1:], marker="x", color=line.get_color())


def inputs(results: Results) -> Figure:
    """Percentiles of the input of the last hidden layer's first unit, a panel per seed, at the α and β that are best
    without batch norm."""
    seeds = results.settings.seeds
    figure, ((*grid,),) = panels(3.4, columns=len(seeds), sharey=True, sharex=True)
    accuracies = cells(results).query("not batch_norm")["accuracy"]
    if accuracies.empty:
        return figure
    _, alpha, beta = accuracies.idxmax()
    for batch_norm, title in SIDES.items():
        for trial in of_seeds(results, alpha, beta, batch_norm):
            axes = grid[seeds.index(trial.point.seed)]
            steps = results.settings.evaluations[: len(trial.loss)]
            low, middle, high = trial.percentiles
            axes.fill_between(steps, low, high, color=COLOURS[batch_norm], alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color=COLOURS[batch_norm], label=title)
    for seed, axes in zip(seeds, grid, strict=True):
        axes.set_title(f"seed {seed}", fontsize=TITLE)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("input of the unit")
    _legend(grid[0])
    figure.suptitle(f"α = {alpha:g}, β = {beta:g}", fontsize=TITLE)
    return figure


def moves(results: Results) -> Figure:
    """One bar per α: how far the accuracy curve moves; a mark at the change by another seed."""
    found = effects(results)
    settings = results.settings
    figure, ((*grid,),) = panels(3.2, columns=max(1, len(settings.moves)), sharey=True)
    for move, axes in zip(settings.moves, grid, strict=False):
        for batch_norm, title in SIDES.items():
            chosen = found[(found["start"] == move[0]) & (found["batch_norm"] == batch_norm)]
            places = [settings.alphas.index(alpha) + (0.2 if batch_norm else -0.2) for alpha in chosen["alpha"]]
            axes.bar(places, chosen["change"], width=0.36, color=COLOURS[batch_norm], label=title)
            label = "another seed" if batch_norm else None
            axes.plot(places, chosen["spread"], "_", color=BLACK, markersize=14, label=label)
        axes.set_xticks(range(len(settings.alphas)), [f"{alpha:g}" for alpha in settings.alphas])
        axes.set_xlabel("α")
        axes.set_yscale("log")
        axes.set_ylim(*CHANGE_RANGE)
        axes.set_title(f"β from {move[0]:g} to {move[1]:g}", fontsize=TITLE)
    grid[0].set_ylabel("change, points of accuracy")
    _legend(grid[0])
    return figure


# By the file's name, how a picture is drawn, and its caption.
PICTURES: dict[str, tuple[Callable[[Results], Figure], str]] = {
    "accuracy.png": (
        heat_maps,
        f"Test accuracy over α × β, mean over the seeds; bold: ≥ {GOAL:g} %, ×: a seed diverged",
    ),
    "losses.png": (losses, "Training loss; a line a seed"),
    "inputs.png": (
        inputs,
        "15th, 50th and 85th percentile of the input of the last hidden layer's first unit over the test images, at "
        "the α and β that are best without batch norm",
    ),
    "moves.png": (moves, "What a small move of β changes in the accuracy over the steps"),
}
