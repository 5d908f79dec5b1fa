"""The picture beside a file of batch norms: bnext's speed-up, one bar per shape, one panel per group and operation."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.report import compare, device_times, group_label, operation_label
from benchmarks.rows import Row
from benchmarks.style import FASTER, LABEL, SLOWER, bar, panels, ratio_axis
from benchmarks.tables import how_measured

BAR_INCHES = 0.24
PANEL_HEAD_INCHES = 0.9
PANEL_WIDTH_INCHES = 3.4


def draw(rows: Sequence[Row]) -> Figure:
    """One line of panels a dtype and layout, one column an operation, a common logarithmic scale."""
    rows = device_times(rows)
    table = compare(rows)
    groups, ops = list(table.groupby("group")), table["op"].cat.categories
    heights = [PANEL_HEAD_INCHES + BAR_INCHES * members["label"].nunique() for _, members in groups]
    figure, grid = panels(
        1 + sum(heights),
        len(groups),
        len(ops),
        width=1.5 + PANEL_WIDTH_INCHES * len(ops),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    for (_, members), line in zip(groups, grid, strict=True):
        for op, axes in zip(ops, line, strict=True):
            chosen = members[members["op"] == op]
            if chosen.empty:
                axes.set_axis_off()
                continue
            for position, speedup in enumerate(chosen["speedup"]):
                bar(axes, position, speedup, FASTER if speedup >= 1 else SLOWER, height=0.7)
            ratio_axis(axes)
            axes.xaxis.set_tick_params(labelbottom=True)
            axes.set_yticks(range(len(chosen)), chosen["label"])
            axes.invert_yaxis()
            axes.set_title(f"{group_label(chosen.iloc[0])}: {operation_label(op)}", fontsize=LABEL)
    # Room on the right for the numbers at the ends of the bars.
    grid[0, 0].set_xlim(min(0.8, 0.8 * table["speedup"].min()), max(2.0, 1.6 * table["speedup"].max()))
    figure.suptitle("torch's time / bnext's time, by input shape", fontsize=LABEL)
    figure.supxlabel(how_measured(rows).replace("; ", "\n"), fontsize=7)
    return figure
