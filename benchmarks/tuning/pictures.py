"""The pictures: heat maps of accuracy, loss curves, the percentiles of a unit's input, the effect of the moves of β."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import write_atomically
from benchmarks.tuning.analysis import GOAL, best, cell, effects, of_seeds
from benchmarks.tuning.results import Results, Trial

DOTS_PER_INCH = 100
SIDES = {False: "without batch norm", True: "with batch norm"}
COLOURS = {False: "#c8553d", True: "#2b6ca3"}  # told apart without red and green
LOSS_RANGE = (1e-4, 30)
CHANGE_RANGE = (0.01, 100)
USUAL_BETA = 0.9


def _panels(width: float, height: float, columns: int = 2, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    # Figure, not pyplot: no window system is asked for and no global state is left behind.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, columns, squeeze=False, **options)[0]
    return figure, axes


def heat_maps(results: Results) -> Figure:
    """Mean final accuracy over α × β; a cross where a seed diverged, bold where the goal is reached."""
    settings = results.settings
    figure, panels = _panels(9.5, 3.4, sharey=True)
    for (batch_norm, title), axes in zip(SIDES.items(), panels, strict=True):
        cells = [[cell(results, alpha, beta, batch_norm) for beta in settings.betas] for alpha in settings.alphas]
        numbers = [[float("nan") if value is None else value for value in line] for line in cells]
        image = axes.imshow(numbers, vmin=0, vmax=100, cmap="viridis", origin="lower", aspect="auto")
        axes.set_xticks(range(len(settings.betas)), [f"{beta:g}" for beta in settings.betas], fontsize=8)
        axes.set_yticks(range(len(settings.alphas)), [f"{alpha:g}" for alpha in settings.alphas], fontsize=8)
        axes.set_xlabel("β")
        axes.set_title(title, fontsize=10)
        for line, alpha in enumerate(settings.alphas):
            for column, beta in enumerate(settings.betas):
                value = cells[line][column]
                if value is not None:
                    crossed = any(t.diverged_at is not None for t in of_seeds(results, alpha, beta, batch_norm))
                    text = f"{value:.0f}{' ×' if crossed else ''}"
                    weight = "bold" if value >= GOAL else "normal"
                    colour = "black" if value > 60 else "white"
                    axes.text(column, line, text, ha="center", va="center", fontsize=8, weight=weight, color=colour)
    panels[0].set_ylabel("α")
    figure.colorbar(image, ax=list(panels), label="test accuracy, %", shrink=0.9)
    return figure


def losses(results: Results) -> Figure:
    """A colour an α, a thin line a seed, at the β of the grid next to 0.9."""
    settings = results.settings
    beta = min(settings.betas, key=lambda value: abs(value - USUAL_BETA))
    figure, panels = _panels(9.5, 3.6, sharey=True, sharex=True)
    shades = mpl.colormaps["viridis"].resampled(len(settings.alphas) + 1)
    for (batch_norm, title), axes in zip(SIDES.items(), panels, strict=True):
        for number, alpha in enumerate(settings.alphas):
            for first, trial in enumerate(of_seeds(results, alpha, beta, batch_norm)):
                label = f"α = {alpha:g}" if first == 0 else None
                _curve(axes, results, trial, trial.loss, color=shades(number), label=label, linewidth=0.9)
        axes.set_yscale("log")
        axes.set_ylim(*LOSS_RANGE)
        axes.set_title(f"{title}, β = {beta:g}", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    _legend(panels[1])
    return figure


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _curve(axes: Axes, results: Results, trial: Trial, values: Sequence[float], **style: Any) -> None:
    """Over the steps; a cross at the end of a trial that diverged."""
    steps = results.settings.evaluations[: len(values)]
    (line,) = axes.plot(steps, values, **style)
    if trial.diverged_at is not None and values:
        axes.plot(steps[-1:], values[-1:], marker="x", color=line.get_color())


def inputs(results: Results) -> Figure:
    """Percentiles of what goes into the last hidden layer's first unit, each seed a panel, at the α and β that are
    best without batch norm."""
    seeds = results.settings.seeds
    figure, panels = _panels(3.2 * len(seeds) + 0.4, 3.4, len(seeds), sharey=True, sharex=True)
    chosen = best(results, batch_norm=False)
    if chosen is None:
        return figure
    for batch_norm, title in SIDES.items():
        for trial in of_seeds(results, chosen.alpha, chosen.beta, batch_norm):
            axes = panels[seeds.index(trial.point.seed)]
            steps = results.settings.evaluations[: len(trial.loss)]
            low, middle, high = trial.percentiles
            axes.fill_between(steps, low, high, color=COLOURS[batch_norm], alpha=0.25, linewidth=0)
            axes.plot(steps, middle, color=COLOURS[batch_norm], label=title)
    for seed, axes in zip(seeds, panels, strict=True):
        axes.set_title(f"seed {seed}", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("input of the unit")
    _legend(panels[0])
    figure.suptitle(f"α = {chosen.alpha:g}, β = {chosen.beta:g}", fontsize=10)
    return figure


def moves(results: Results) -> Figure:
    """A bar an α: how far the accuracy curve moves; a mark at what another seed does."""
    found = effects(results)
    figure, panels = _panels(9.5, 3.2, max(1, len(results.settings.moves)), sharey=True)
    alphas = results.settings.alphas
    for move, axes in zip(results.settings.moves, panels, strict=False):
        for batch_norm, title in SIDES.items():
            chosen = [e for e in found if e.move == move and e.batch_norm == batch_norm]
            places = [alphas.index(e.alpha) + (0.2 if batch_norm else -0.2) for e in chosen]
            axes.bar(places, [e.change for e in chosen], width=0.36, color=COLOURS[batch_norm], label=title)
            spreads = [float("nan") if e.spread is None else e.spread for e in chosen]
            label = "another seed" if batch_norm else None
            axes.plot(places, spreads, "_", color="black", markersize=14, label=label)
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set_xlabel("α")
        axes.set_yscale("log")
        axes.set_ylim(*CHANGE_RANGE)
        axes.set_title(f"β from {move[0]:g} to {move[1]:g}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change, points of accuracy")
    _legend(panels[0])
    return figure


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


def captions() -> dict[str, str]:
    return {name: caption for name, (_, caption) in PICTURES.items()}


def save_pictures(folder: Path, results: Results) -> None:
    for name, (draw, _) in PICTURES.items():
        buffer = io.BytesIO()
        draw(results).savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        write_atomically(folder / name, buffer.getvalue())
