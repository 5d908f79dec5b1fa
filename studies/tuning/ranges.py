"""The part of the range of α × β that trains, by batch, ghost batches and initialisation: a table and a picture."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.style import LABEL, SKY, TITLE, panels
from benchmarks.tables import Sheet, markdown, spread
from studies.tuning.analysis import GOAL, how_measured, trials
from studies.tuning.pictures import COLOURS, SIDES
from studies.tuning.results import Results
from studies.tuning.settings import Settings

GROUP = ["init", "kind", "values"]


def span(settings: Settings) -> float:
    """The decades of α that the grid covers: for each α, those between two neighbours."""
    between = np.diff(np.log10(settings.alphas))
    return float(between.mean() * len(settings.alphas)) if len(between) else 1.0


def widths(results: Results) -> pd.DataFrame:
    """One line per initialisation, ``kind`` of network and ``values`` that are normalised together, in columns
    ``mean``, ``min`` and ``max`` over the seeds.

    The width at a β is the part of the grid's α that train, in decades; the mean over β is shown.
    """
    settings = results.settings
    table = trials(results)
    ghosts = f"batch of {max(settings.batch_sizes)} in parts"
    parts = table["virtual_batch_size"]
    table["kind"] = table["batch_norm"].map(SIDES).where(parts == 0, ghosts)
    table["values"] = parts.where(parts > 0, table["batch_size"])
    table["width"] = span(settings) * (table["final"] >= GOAL)
    of_seeds = table.groupby([*GROUP, "seed"])["width"].mean()
    found = of_seeds.groupby(GROUP).agg(["mean", "min", "max"])
    kinds = [kind for kind in (*SIDES.values(), ghosts) if kind in set(table["kind"])]
    order = pd.MultiIndex.from_product([settings.inits, kinds, sorted(table["values"].unique())], names=GROUP)
    return found.reindex(order).dropna()


def widths_sheet(results: Results) -> Sheet:
    """A line per initialisation and kind of network, a column per number of values that are normalised together."""
    found = widths(results)
    cells = [f"{mean:.1f} ({least:.1f} to {most:.1f})" for _, mean, least, most in found.itertuples()]
    table = spread(pd.Series(cells, found.index, dtype=object)).sort_index(axis=1).fillna("").rename(columns=str)
    return Sheet(table.reset_index().rename(columns={"init": "initialisation", "kind": ""}), labels=2)


def draw_widths(results: Results) -> Figure:
    """The width that trains over the values that are normalised together, a panel per initialisation; a band spans the
    seeds, from the least to the largest width."""
    found = widths(results)
    colours = {SIDES[side]: colour for side, colour in COLOURS.items()}
    ticks = sorted(found.index.unique("values"))
    figure, ((*grid,),) = panels(3.2, columns=len(results.settings.inits), sharex=True, sharey=True)
    for init, axes in zip(results.settings.inits, grid, strict=True):
        for kind, line in found[found.index.get_level_values("init") == init].groupby("kind", sort=False):
            values = line.index.get_level_values("values")
            colour = colours.get(kind, SKY)
            axes.plot(values, line["mean"], "o-", color=colour, markersize=4, label=kind)
            axes.fill_between(values, line["min"], line["max"], color=colour, alpha=0.25, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
        axes.set_title(f"initialisation {init}", fontsize=TITLE)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("decades of α that train", fontsize=LABEL)
    figure.supxlabel("images in the batch, or in a part that is normalised by itself", fontsize=LABEL)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=LABEL, frameon=False)
    return figure


def ranges_block(results: Results) -> str:
    """The table of docs/benchmarks.md, and how it was measured."""
    settings = results.settings
    alphas, betas = (", ".join(f"{value:g}" for value in values) for values in (settings.alphas, settings.betas))
    parts = [
        markdown(widths_sheet(results)),
        f"Decades of α that end at ≥ {GOAL:g} % of the test images, mean over β of {betas} and over the seeds, and in "
        f"brackets the least and the most of a seed; α of {alphas}, so that at most "
        f"{span(settings):.1f} can train. A column: the images in a batch, or in a part that is normalised by itself.",
        f"Measured by `python -m benchmarks tuning --range`: {how_measured(results)}",
    ]
    return "\n\n".join(parts)
