"""The picture: bnext's speed-up against torch, a bar a shape, a panel a dtype, layout and operation."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import Comparison, compare, device_times, groups, how_measured, operations
from benchmarks.rows import Row, write_atomically

BAR_INCHES = 0.24
PANEL_HEAD_INCHES = 0.9
PANEL_WIDTH_INCHES = 3.4
DOTS_PER_INCH = 110

FASTER, SLOWER = "#2b6ca3", "#c8553d"  # told apart without red and green


def draw(rows: Sequence[Row]) -> Figure:
    """One line of panels a dtype and layout, one column an operation, a common logarithmic scale."""
    rows = device_times(rows)
    comparisons = compare(rows)
    lines, columns = groups(comparisons), operations(comparisons)
    bars = [len({c.label for c in comparisons if c.group == group}) for group in lines]
    heights = [PANEL_HEAD_INCHES + BAR_INCHES * count for count in bars]
    # Figure, not pyplot: no window system is asked for and no global state is left behind.
    figure = Figure(figsize=(1.5 + PANEL_WIDTH_INCHES * len(columns), 1 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(lines), len(columns), squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights})
    for line, group in enumerate(lines):
        for column, op in enumerate(columns):
            chosen = [c for c in comparisons if c.group == group and c.op == op]
            axes: Axes = grid[line, column]
            if chosen:
                draw_panel(axes, chosen)
                axes.set_title(f"{group}: {op.replace('_', ' + ')}", fontsize=9)
            else:
                axes.set_axis_off()
    speedups = [c.speedup for c in comparisons]
    # Room on the right for the numbers at the ends of the bars.
    grid[0, 0].set_xlim(min(0.8, 0.8 * min(speedups)), max(2.0, 1.6 * max(speedups)))
    figure.suptitle("torch's time / bnext's time, by input shape", fontsize=11)
    figure.supxlabel(how_measured(rows).replace("; ", "\n"), fontsize=7)
    return figure


def draw_panel(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    # Bars start at 1, so that twice as fast and half as fast are equally long on the logarithmic scale.
    speedups = [c.speedup for c in comparisons]
    positions = range(len(comparisons))
    colours = [FASTER if speedup >= 1 else SLOWER for speedup in speedups]
    axes.barh(positions, [speedup - 1 for speedup in speedups], left=1, color=colours, height=0.7)
    for position, speedup in zip(positions, speedups, strict=True):
        axes.text(max(speedup, 1) * 1.03, position, f"{speedup:.2f}", va="center", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_tick_params(labelsize=7, labelbottom=True)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(positions, [c.label for c in comparisons], fontsize=7)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def save_plot(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    write_atomically(path, buffer.getvalue())
