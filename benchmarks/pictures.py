"""The picture beside a file of results, and the README's pictures, which are drawn only from committed results."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from benchmarks import model_report, sweep_report, variants_report
from benchmarks.acceptance import VARIANT_LIMITS
from benchmarks.numerics_report import DATA, RELATIVE, Results, distance, is_numerics, load_results
from benchmarks.report import MODELS, TENSORS, compare, device_times, group_label, means, of_kinds
from benchmarks.rows import InputError, Row, is_touched, load_rows
from benchmarks.style import BLACK, BLUE, LABEL, NUMBER, ORANGE, SKY, TITLE, WIDTH_INCHES, bar, panels, ratio_axis, save
from benchmarks.suites import BNEXT, BNEXT_BY_HAND, SWEEP, TORCH_BY_HAND, VARIANTS, WITHOUT
from benchmarks.tables import mean_of, operation_label, spread
from benchmarks.traffic import SIZE_CLASSES

LINE_INCHES = 0.21  # a bar or a mark with a number beside it
PANEL_INCHES = 3.0
HEAD_INCHES = 1.1  # the titles and the scale

SHOWN_OPS = ("forward", "backward")
SIZE_COLOURS = {name: colour for (name, _), colour in zip(SIZE_CLASSES, (BLUE, SKY, ORANGE), strict=True)}
MODEL_COLOURS = {"bnext": SKY, "bnext-fused": BLUE}
MEMORY_COLOURS = {"bnext-fused": SKY, "bnext-recompute": BLUE, "torch-checkpoint": ORANGE}
VARIANT_COLOURS = {BNEXT: BLUE, BNEXT_BY_HAND: SKY, TORCH_BY_HAND: ORANGE}
MODEL_TICKS = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 3, 4)
SWEPT_INCHES = 0.85  # a line of heat maps
SWEPT_TICKS = (0.25, 0.5, 1, 2, 4)  # values beyond have the last colour
# An odd number of colours: the middle one is white.
SWEPT_COLOURS = LinearSegmentedColormap.from_list("slower, faster", [ORANGE, "white", BLUE], 17)
SMALL = 7  # points
SMALLEST_ERROR, LARGEST_ERROR = 1e-9, 1e2  # 0 is drawn at the first; NaN, inf and larger errors at the second


def draw(rows: Sequence[Row]) -> Figure | None:
    """The picture beside a file: of batch norms, of the sweep, of variants, or of batch norm's cost in models."""
    found = of_kinds(rows)
    for kind, draw_kind in ((TENSORS, draw_operators), (SWEEP, draw_sweep), (VARIANTS, draw_variants)):
        if found[kind]:
            return draw_kind(found[kind])
    return draw_models(found[MODELS]) or draw_memory(found[MODELS])


def draw_bars(
    tables: dict[str, pd.DataFrame], colours: dict[str, str], title: str, mark: str = "", ticks: Sequence[float] = ()
) -> Figure:
    """One panel per table, whose lines are the same, and one bar from 1 for each of a line's values that have a colour.

    ``mark``: the column that is drawn as a line across the bars; ``ticks``: instead of the powers of two.
    """
    everything = pd.concat(tables.values())
    names = next(iter(tables.values())).index
    most = everything[list(colours)].count(axis=1).max()
    height = HEAD_INCHES + max(most, 2) * LINE_INCHES * len(names)
    width = max(WIDTH_INCHES, PANEL_INCHES * len(tables))
    figure, ((*grid,),) = panels(height, columns=len(tables), width=width, sharex=True, sharey=True)
    for axes, (head, table) in zip(grid, tables.items(), strict=True):
        for line, (_, values) in enumerate(table.iterrows()):
            ratios = values[list(colours)].dropna()
            thickness = 0.8 / max(len(ratios), 1)
            for index, (name, ratio) in enumerate(ratios.items()):
                position = line - 0.4 + (index + 0.5) * thickness
                bar(axes, position, ratio, colours[name], 0.9 * thickness, max(1.0, values.get(mark, 1.0)))
            if mark:
                axes.plot([values[mark]] * 2, [line - 0.42, line + 0.42], color=BLACK, linewidth=1.5)
        ratio_axis(axes)
        if ticks:
            axes.set_xticks(ticks)
        axes.set_title(head, fontsize=TITLE)
    grid[0].set_xlim(min(0.9, 0.95 * everything.min().min()), 1.6 * everything.max().max())
    shown = {name: colour for name, colour in colours.items() if everything[name].notna().any()}
    return lettered(figure, names, shown | ({mark: BLACK} if mark else {}), title)


def draw_models(rows: Sequence[Row]) -> Figure | None:
    """Training steps: geometric means over the layouts. None where no cost of batch norm was measured.

    The step without batch norm is the limit of any layer.
    """
    costs = model_report.compare_costs(model_report.compare(rows))
    if costs.empty:
        return None
    costs["model"] = costs["model"].str.removeprefix("torchvision/").str.replace("/", " ")
    costs = costs.rename(columns={WITHOUT: "without batch norm"})
    models, columns = costs["model"].unique(), [*MODEL_COLOURS, "without batch norm"]
    tables = {
        dtype: found.groupby("model")[columns].agg(mean_of).reindex(models)
        for dtype, found in costs.groupby("dtype", sort=False)
    }
    title = "Training step: torch's time / the time with bnext"
    return draw_bars(tables, MODEL_COLOURS, title, "without batch norm", MODEL_TICKS)


def draw_memory(rows: Sequence[Row]) -> Figure | None:
    """A step's memory and time: geometric means over the layouts. None where no memory was measured."""
    rows = [row for row in rows if row.image_bytes is not None]
    if not rows:
        return None
    table = model_report.compare(rows)
    table = table.merge(table.loc[table["is_torch"], [*model_report.CASE, "held_bytes"]], on=model_report.CASE)
    table["model"] = table["model"].str.partition("/")[2]
    ratios = {"memory held for backward": table["held_bytes_x"] / table["held_bytes_y"], "time": 1 / table["speedup"]}
    tables = {
        head: spread(values.groupby([table["model"], table["provider"]], sort=False).agg(mean_of)).reindex(
            columns=list(MEMORY_COLOURS)
        )
        for head, values in ratios.items()
    }
    return draw_bars(tables, MEMORY_COLOURS, "Training step: memory and time / torch's")


def draw_operators(rows: Sequence[Row], ops: Sequence[str] = ()) -> Figure:
    """One bar per dtype, layout and size class, geometric means over shapes."""
    table = means(compare(device_times(rows))).reset_index()
    table["name"] = table.apply(group_label, axis=1)
    names = table["name"].unique()
    tables = {
        operation_label(op): table[table["op"] == op].pivot(index="name", columns="size_class", values="speedup")
        for op in ops or table["op"].cat.categories
    }
    tables = {op: found.reindex(names, columns=list(SIZE_COLOURS)) for op, found in tables.items()}
    return draw_bars(tables, SIZE_COLOURS, "Single operators: torch's time / bnext's, by size of the tensor")


def draw_variants(rows: Sequence[Row]) -> Figure:
    """One line per variant and layout, geometric means; a mark at bnext's bar."""
    table = variants_report.compare(rows)
    table["name"] = table["variant"] + ", " + table["layout"]
    table["bnext's bar"] = table["variant"].map(VARIANT_LIMITS)
    columns = [*VARIANT_COLOURS, "bnext's bar"]
    tables = {
        operation_label(op): found.groupby("name")[columns].agg(mean_of).reindex(table["name"].unique())
        for op, found in table.groupby("op", sort=False)
    }
    title = "Padding and ghost batches: time / that of batch norm of the whole tensor"
    return draw_bars(tables, VARIANT_COLOURS, title, "bnext's bar")


def draw_sweep(rows: Sequence[Row]) -> Figure:
    """C against the side of a plane: one line of panels per dtype, layout and operation, one column per N.

    A cell is a point; its colour is torch's time / bnext's. A dot marks where bnext is slower beyond the rounds'
    spread.
    """
    table = sweep_report.points(rows)
    lines = list(table.groupby(sweep_report.GROUP, sort=False))
    batches, channels, sides = (sorted(table[axis].unique()) for axis in sweep_report.AXES)
    height = HEAD_INCHES + SWEPT_INCHES * len(lines)
    figure, grid = panels(height, len(lines), len(batches), sharex=True, sharey=True)
    for ((dtype, layout, op), line), (*cells,) in zip(lines, grid, strict=True):
        for n, axes in zip(batches, cells, strict=True):
            image = draw_cells(axes, line[line["n"] == n], channels, sides)
        head = f"{dtype}\n{layout}\n" if op == lines[0][0][-1] else ""
        cells[0].set_ylabel(f"{head}{op}", fontsize=SMALL)
    for n, top, bottom in zip(batches, grid[0], grid[-1], strict=True):
        top.set_title(f"N = {n}", fontsize=LABEL)
        bottom.set_xticks(range(len(sides)), sides)
        bottom.set_yticks(range(0, len(channels), 2), channels[::2])
        bottom.set_xlabel("H = W", fontsize=LABEL)
    figure.supylabel("C", fontsize=LABEL)
    figure.suptitle("Batch norm on a grid: torch's time / bnext's; a dot where bnext is slower", fontsize=TITLE)
    scale = figure.colorbar(image, ax=grid, location="bottom", extend="both", aspect=50, pad=0.01)
    scale.set_ticks(SWEPT_TICKS, labels=[f"{tick:g}" for tick in SWEPT_TICKS])
    scale.minorticks_off()
    return figure


def draw_cells(axes: Axes, found: pd.DataFrame, channels: list[int], sides: list[int]) -> AxesImage:
    """The points of one N."""
    speedups = found.pivot(index="c", columns="side", values="speedup").reindex(index=channels, columns=sides)
    norm = LogNorm(SWEPT_TICKS[0], SWEPT_TICKS[-1])
    slower = found[found["slower"]]
    axes.scatter(slower["side"].map(sides.index), slower["c"].map(channels.index), color=BLACK, s=4)
    axes.set_facecolor("#dddddd")
    axes.tick_params(labelsize=SMALL, length=0)
    return axes.imshow(speedups, norm=norm, cmap=SWEPT_COLOURS, origin="lower", aspect="auto")


def draw_accuracy(results: Results) -> Figure:
    """The errors of float32 outputs and input gradients against float64: one line per case, bnext's beside torch's."""
    errors = results.errors[(results.errors["unit"] == RELATIVE) & results.errors["quantity"].isin(DATA)]
    columns = ["bnext", "torch"]
    shown = errors.assign(**{name: distance(errors[name]).clip(SMALLEST_ERROR, LARGEST_ERROR) for name in columns})
    worst = shown.groupby(["quantity", "case"], sort=False)[columns].max()
    cases = errors["case"].unique()
    height = HEAD_INCHES + 1.2 * LINE_INCHES * len(cases)
    figure, ((*grid,),) = panels(height, columns=len(DATA), sharex=True, sharey=True)
    for quantity, axes in zip(DATA, grid, strict=True):
        found = worst.loc[quantity].reindex(cases)
        axes.hlines(range(len(cases)), found["bnext"], found["torch"], color="#bbbbbb", linewidth=1.5, zorder=1)
        for name, colour in zip(columns, (BLUE, ORANGE), strict=True):
            axes.scatter(found[name], range(len(cases)), color=colour, s=28, zorder=2)
        mark_limits(axes, found)
        axes.set_xscale("log")
        axes.set_title(quantity, fontsize=TITLE)
        axes.grid(axis="x", alpha=0.3)
    title = "float32: largest error against float64, as a share of the channel's largest value"
    return lettered(figure, cases, {"bnext": BLUE, "torch": ORANGE}, title)


def mark_limits(axes: Axes, found: pd.DataFrame) -> None:
    """Label the values that are drawn at an end of the scale because they lie beyond it."""
    for line, (smallest, largest) in enumerate(zip(found.min(axis=1), found.max(axis=1), strict=True)):
        if smallest == SMALLEST_ERROR:
            axes.annotate("0", (smallest, line), (5, 0), textcoords="offset points", va="center", fontsize=NUMBER)
        if largest == LARGEST_ERROR:
            style = {"textcoords": "offset points", "va": "center", "ha": "right", "fontsize": NUMBER}
            axes.annotate("NaN or inf", (largest, line), (-6, 6), **style)


def lettered(figure: Figure, names: Sequence[str], colours: dict[str, str], title: str) -> Figure:
    """Add the name of each line, the first at the top, a legend of the colours, and a title."""
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=TITLE)
    handles = [Figure().subplots().barh(0, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside lower center", ncols=len(colours), fontsize=LABEL, frameon=False)
    return figure


def drawn(folder: Path) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """The name of each picture that a folder's results give, and the function that draws it."""
    for file in sorted(folder.glob("*.json")):
        if is_numerics(file):
            yield "accuracy.png", partial(draw_accuracy, load_results(file))
            continue
        rows = [row for row in load_rows(file) if not is_touched(row.environment)]
        found = of_kinds(rows)
        chosen = {
            "operators.png": (partial(draw_operators, ops=SHOWN_OPS), [row for row in found[TENSORS] if not row.act]),
            "models.png": (draw_models, [row for row in found[MODELS] if row.provider == WITHOUT] and found[MODELS]),
            "memory.png": (draw_memory, [row for row in found[MODELS] if row.image_bytes is not None]),
            "sweep.png": (draw_sweep, found[SWEEP]),
            "variants.png": (draw_variants, found[VARIANTS]),
        }
        yield from ((name, partial(function, of)) for name, (function, of) in chosen.items() if of)


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draw all pictures, the tuning studies' too, and return their files; raises InputError where two results give the
    same one."""
    from studies.tuning.pictures import heat_maps
    from studies.tuning.ranges import draw_widths
    from studies.tuning.results import load_results as load_study

    found: dict[str, Callable[[], Figure]] = {}
    for name, function in drawn(results):
        if name in found:
            raise InputError(f"{results}: two files for {name}")
        found[name] = function
    for study, name, draw_study in ((".", "tuning.png", heat_maps), ("range", "tuning-range.png", draw_widths)):
        file = results / "tuning" / study / "results.json"
        if file.exists():
            found[name] = partial(draw_study, load_study(file))
    output.mkdir(parents=True, exist_ok=True)
    for name, function in found.items():
        save(output / name, function())
    return [output / name for name in found]
