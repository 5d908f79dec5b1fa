"""The picture beside a file of results, and the README's pictures, which are drawn only from committed results."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
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
from benchmarks.tables import mean_of, operation_label
from benchmarks.traffic import SIZE_CLASSES

LINE_INCHES = 0.21  # a bar or a mark with a number beside it
OP_INCHES = 3.0
HEAD_INCHES = 1.1  # the titles and the scale

SHOWN_OPS = ("forward", "backward")
SIZE_COLOURS = {name: colour for (name, _), colour in zip(SIZE_CLASSES, (BLUE, SKY, ORANGE), strict=True)}
SWEPT_INCHES = 0.85  # a line of heat maps
SWEPT_TICKS = (0.25, 0.5, 1, 2, 4)  # values beyond have the last colour
# An odd number of colours: the middle one is white.
SWEPT_COLOURS = LinearSegmentedColormap.from_list("slower, faster", [ORANGE, "white", BLUE], 17)
SMALL = 7  # points
MODEL_TICKS = (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 3, 4)
MEMORY_COLOURS = {"bnext-fused": SKY, "bnext-recompute": BLUE, "torch-checkpoint": ORANGE}
VARIANT_COLOURS = {BNEXT: BLUE, BNEXT_BY_HAND: SKY, TORCH_BY_HAND: ORANGE}
MODEL_COLOURS = {"bnext": SKY, "bnext-fused": BLUE}
SMALLEST_ERROR, LARGEST_ERROR = 1e-9, 1e2  # 0 is drawn at the first; NaN, inf and larger errors at the second


def draw(rows: Sequence[Row]) -> Figure | None:
    """Draw the picture beside a file: of batch norms, of the sweep, of variants, or of batch norm's cost in models."""
    found = of_kinds(rows)
    for kind, draw_kind in ((TENSORS, draw_operators), (SWEEP, draw_sweep), (VARIANTS, draw_variants)):
        if found[kind]:
            return draw_kind(found[kind])
    return draw_models(found[MODELS]) or draw_memory(found[MODELS])


def draw_models(rows: Sequence[Row]) -> Figure | None:
    """A training step beside torch's: two bars per model, one panel per dtype, geometric means over the layouts.

    A mark shows the step without batch norm, the limit of any layer. None where no cost was measured.
    """
    costs = model_report.compare_costs(model_report.compare(rows))
    if costs.empty:
        return None
    speedups = costs.groupby(["dtype", "model"], sort=False)[[*MODEL_COLOURS, WITHOUT]].agg(mean_of)
    models, dtypes = costs["model"].unique(), costs["dtype"].unique()
    height = HEAD_INCHES + 2 * LINE_INCHES * len(models)
    figure, ((*grid,),) = panels(height, columns=len(dtypes), sharex=True, sharey=True)
    for dtype, axes in zip(dtypes, grid, strict=True):
        found = speedups.loc[dtype].reindex(models)
        for line, (_, model) in enumerate(found.iterrows()):
            beyond = max(1.0, model[WITHOUT])
            for offset, (provider, colour) in zip((-0.2, 0.2), MODEL_COLOURS.items(), strict=True):
                if pd.notna(model[provider]):
                    bar(axes, line + offset, model[provider], colour, height=0.36, beyond=beyond)
            axes.plot([model[WITHOUT]] * 2, [line - 0.42, line + 0.42], color=BLACK, linewidth=1.5)
        ratio_axis(axes)
        axes.set_xticks(MODEL_TICKS)
        axes.set_title(dtype, fontsize=TITLE)
    grid[0].set_xlim(min(0.9, 0.95 * speedups.min().min()), 1.25 * speedups.max().max())
    names = [name.removeprefix("torchvision/").replace("/", " ") for name in models]
    colours = {"bnext": SKY, "bnext, fused": BLUE, "without batch norm": BLACK}
    return lettered(figure, names, colours, "Training step: torch's time / the time with bnext")


def draw_memory(rows: Sequence[Row]) -> Figure | None:
    """A step's memory and time as shares of torch's: geometric means over the layouts. None where no memory was
    measured."""
    rows = [row for row in rows if row.image_bytes is not None]
    if not rows:
        return None
    table = model_report.compare(rows)
    table = table.merge(table.loc[table["is_torch"], [*model_report.CASE, "held_bytes"]], on=model_report.CASE)
    table["held"], table["time"] = table["held_bytes_x"] / table["held_bytes_y"], 1 / table["speedup"]
    models = table["model"].unique()
    found = table.groupby(["model", "provider"])[["held", "time"]].agg(mean_of).unstack().reindex(models)
    found = found.reindex(columns=pd.MultiIndex.from_product((["held", "time"], MEMORY_COLOURS)))
    height = HEAD_INCHES + len(MEMORY_COLOURS) * LINE_INCHES * len(models)
    figure, ((*grid,),) = panels(height, columns=2, sharey=True)
    for axes, share, title in zip(grid, ("held", "time"), ("held from forward to backward", "time"), strict=True):
        for index, (provider, colour) in enumerate(MEMORY_COLOURS.items()):
            lines = np.arange(len(models)) + 0.28 * (index - 1)
            bars = axes.barh(lines, found[share, provider], color=colour, height=0.26)
            axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=NUMBER)
        axes.axvline(1, color=BLACK, linewidth=0.8)
        axes.set_title(title, fontsize=TITLE)
        axes.set_xlim(0, 1.15 * found[share].max().max())
    names = [name.partition("/")[2] for name in models]
    return lettered(figure, names, MEMORY_COLOURS, "Training step: what it holds, and its time, beside torch's (1)")


def draw_operators(rows: Sequence[Row], ops: Sequence[str] = ()) -> Figure:
    """Each operation beside torch's: one bar per dtype, layout and size class, geometric means over shapes."""
    table = means(compare(device_times(rows))).reset_index()
    ops = ops or list(table["op"].cat.categories)
    table["name"] = table.apply(group_label, axis=1)
    names = table["name"].unique()
    height = HEAD_INCHES + 2 * LINE_INCHES * len(names)
    width = max(WIDTH_INCHES, OP_INCHES * len(ops))
    figure, ((*grid,),) = panels(height, columns=len(ops), width=width, sharex=True, sharey=True)
    for op, axes in zip(ops, grid, strict=True):
        for line, name in enumerate(names):
            found = table[(table["op"] == op) & (table["name"] == name)]
            height = 0.8 / max(len(found), 1)
            for index, (size, speedup) in enumerate(zip(found["size_class"], found["speedup"], strict=True)):
                bar(axes, line - 0.4 + (index + 0.5) * height, speedup, SIZE_COLOURS[size], height=0.9 * height)
        ratio_axis(axes)
        axes.set_title(operation_label(op), fontsize=TITLE)
    grid[0].set_xlim(min(0.9, table["speedup"].min()), 1.6 * table["speedup"].max())
    colours = {name: colour for name, colour in SIZE_COLOURS.items() if name in set(table["size_class"])}
    return lettered(figure, names, colours, "Single operators: torch's time / bnext's, by size of the tensor")


def draw_variants(rows: Sequence[Row]) -> Figure:
    """Times beside plain's: one line per variant and layout, geometric means; a mark at bnext's bar."""
    table = variants_report.compare(rows)
    table["name"] = table["variant"] + ", " + table["layout"]
    names, ops = table["name"].unique(), table["op"].unique()
    limits = table.drop_duplicates("name")["variant"].map(VARIANT_LIMITS)
    ratios = table.groupby(["op", "name"])[list(VARIANT_COLOURS)].agg(mean_of)
    height = HEAD_INCHES + len(VARIANT_COLOURS) * LINE_INCHES * len(names)
    figure, ((*grid,),) = panels(height, columns=len(ops), sharex=True, sharey=True)
    for op, axes in zip(ops, grid, strict=True):
        for line, (name, limit) in enumerate(zip(names, limits, strict=True)):
            for index, (way, colour) in enumerate(VARIANT_COLOURS.items()):
                bar(axes, line + 0.28 * (index - 1), ratios.loc[(op, name), way], colour, height=0.26, beyond=limit)
            axes.plot([limit] * 2, [line - 0.42, line - 0.14], color=BLACK, linewidth=1.5)
        ratio_axis(axes)
        axes.set_title(operation_label(op), fontsize=TITLE)
    grid[0].set_xlim(min(0.9, 0.95 * ratios.min().min()), 1.6 * ratios.max().max())
    colours = {way.replace("-", " "): colour for way, colour in VARIANT_COLOURS.items()} | {"bar": BLACK}
    return lettered(figure, names, colours, "Padding and ghost batches: time / that of batch norm of the whole tensor")


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


def drawn(folder: Path) -> Iterator[tuple[str, Figure]]:
    """The name and figure of each picture that a folder's results give."""
    for file in sorted(folder.glob("*.json")):
        if is_numerics(file):
            yield "accuracy.png", draw_accuracy(load_results(file))
            continue
        rows = [row for row in load_rows(file) if not is_touched(row.environment)]
        found = of_kinds(rows)
        models = found[MODELS]
        plain = [row for row in found[TENSORS] if not row.act]
        costs = draw_models(models) if models else None
        if costs:
            yield "models.png", costs
        memory = draw_memory(models)
        if memory:
            yield "memory.png", memory
        if plain:
            yield "operators.png", draw_operators(plain, SHOWN_OPS)
        if found[SWEEP]:
            yield "sweep.png", draw_sweep(found[SWEEP])
        if found[VARIANTS]:
            yield "variants.png", draw_variants(found[VARIANTS])


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draw all pictures, the tuning studies' too, and return their files; raises InputError where two results give the
    same one."""
    from studies.tuning.pictures import heat_maps
    from studies.tuning.ranges import draw_widths
    from studies.tuning.results import load_results as load_study

    found: dict[str, Figure] = {}
    for name, figure in drawn(results):
        if name in found:
            raise InputError(f"{results}: two files for {name}")
        found[name] = figure
    for study, name, draw_study in ((".", "tuning.png", heat_maps), ("range", "tuning-range.png", draw_widths)):
        file = results / "tuning" / study / "results.json"
        if file.exists():
            found[name] = draw_study(load_study(file))
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in found.items():
        save(output / name, figure)
    return [output / name for name in found]
