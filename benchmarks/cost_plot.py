"""The picture: how much of what batch norm costs a model is gone, a bar a model, a panel a dtype and layout."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cost import Cost, compare_costs
from benchmarks.model_report import compare_models, of_models
from benchmarks.plot import BAR_INCHES, FASTER, PANEL_HEAD_INCHES, PANEL_WIDTH_INCHES, SLOWER
from benchmarks.report import how_measured
from benchmarks.rows import Row

PLAIN, FUSED = "bnext", "bnext-fused"
LOWEST, HIGHEST = -0.25, 1.25  # where batch norm costs next to nothing, shares of it can be anything


def draw_costs(rows: Sequence[Row]) -> Figure | None:
    """One line of panels a dtype, one column a layout, a common scale; nothing where no cost was measured."""
    costs, _ = compare_costs(compare_models(of_models(rows)))
    if not costs:
        return None
    dtypes, layouts, models = (list(dict.fromkeys(cost.case[index] for cost in costs)) for index in (2, 3, 0))
    height = PANEL_HEAD_INCHES + BAR_INCHES * len(models)
    size = (3 + PANEL_WIDTH_INCHES * len(layouts), 1 + height * len(dtypes))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(dtypes), len(layouts), squeeze=False, sharex=True, sharey=True)
    for dtype, line in zip(dtypes, grid, strict=True):
        for layout, axes in zip(layouts, line, strict=True):
            draw_panel(axes, models, [cost for cost in costs if cost.case[2:] == (dtype, layout)])
            axes.set_title(f"{dtype}, {layout}", fontsize=9)
    grid[0, 0].set_xlim(LOWEST - 0.05, HIGHEST + 0.25)  # room for the numbers at the ends of the bars
    grid[0, 0].invert_yaxis()
    figure.suptitle("Of batch norm's cost in a training step, gone: fused (bar), and layers alone (mark)", fontsize=11)
    figure.supxlabel(how_measured(rows).replace("; ", "\n"), fontsize=7)
    return figure


def draw_panel(axes: Axes, models: Sequence[str], costs: Sequence[Cost]) -> None:
    for cost in costs:
        position = models.index(cost.case[0])
        fused, plain = cost.gone(FUSED), cost.gone(PLAIN)
        if fused is not None:
            axes.barh(position, min(max(fused, LOWEST), HIGHEST), color=FASTER if fused >= 0 else SLOWER, height=0.7)
            axes.text(min(max(fused, plain or 0, 0), HIGHEST) + 0.03, position, f"{fused:.0%}", va="center", fontsize=7)
        if plain is not None:
            axes.plot([plain, plain], [position - 0.35, position + 0.35], color="black", linewidth=1.5)
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
    axes.xaxis.set_tick_params(labelsize=7, labelbottom=True)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(models)), models, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
