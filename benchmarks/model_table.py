"""The tables of whole models, on the terminal and in a README."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from benchmarks.cost import LEGEND as COST_LEGEND
from benchmarks.cost import compare_costs, cost_lines, cost_means
from benchmarks.model_report import (
    ModelComparison,
    Sheet,
    bar_summary,
    by_operation,
    compare_models,
    curves_line,
    fused_bar,
    images_per_s,
    in_training,
)
from benchmarks.report import MB, how_measured
from benchmarks.rows import Row

FOLDED_LINES = 24  # a longer table is for those who ask for it
MODEL_HEADS = ("model", "input", "dtype", "layout")

STEP_LEGEND = "A step is forward, loss, backward and SGD with momentum, on one batch."
TRAINING_LEGEND = (
    "x torch: the time with torch's layers / the provider's, eager against eager, compiled against compiled."
)
CPU_PEAK = "Peak: resident memory of a process that does nothing else, beyond what it had before there was a model."
GPU_PEAK = "Peak: allocated memory of a process that does nothing else."
CALLS_LEGEND = "x torch: the time with torch alone / that with bnext, both compiled."


def training_lines(comparisons: Iterable[ModelComparison]) -> Sheet:
    found = in_training(comparisons)
    peaks = any(c.row.peak_bytes is not None for c in found)
    heads = [*MODEL_HEADS, "layers", "ms a step", "20-80 %", "images/s", "x torch", *["peak MB"][:peaks], "last loss"]
    lines = []
    for c in found:
        row = c.row
        lines.append(
            [
                *c.case,
                row.provider,
                f"{row.median_s * 1e3:.1f}",
                f"{row.p20_s * 1e3:.1f}-{row.p80_s * 1e3:.1f}",
                f"{images_per_s(row):.1f}",
                f"{c.speedup:.2f}",
                *["" if row.peak_bytes is None else f"{row.peak_bytes / MB:.0f}"][:peaks],
                f"{row.losses[-2]:.4f}" if row.losses else "",
            ]
        )
    return Sheet(5, heads, lines)


def call_lines(comparisons: Sequence[ModelComparison]) -> Sheet:
    """The same of calls: for each operation torch's time, bnext's, and how many times faster that is."""
    by_case = by_operation(comparisons)
    ops = list(dict.fromkeys(op for members in by_case.values() for op in members))
    heads = [*MODEL_HEADS, "layers"]
    for op in ops:
        heads += [f"{op.replace('_', ' + ')}, torch ms", "ms", "x torch"]
    lines = []
    for case, members in by_case.items():
        cells = list(case)
        for op in ops:
            c = members.get(op)
            cells += (
                [f"{c.torch.median_s * 1e3:.3f}", f"{c.row.median_s * 1e3:.3f}", f"{c.speedup:.2f}"] if c else [""] * 3
            )
        lines.append(cells)
    return Sheet(5, heads, lines)


def sheets(comparisons: Sequence[ModelComparison]) -> list[Sheet]:
    """Those that have lines, means first."""
    costs, others = compare_costs(comparisons)
    found = (cost_means(costs), cost_lines(costs), training_lines(others), call_lines(others))
    return [sheet for sheet in found if sheet.lines]


def notes(comparisons: Sequence[ModelComparison]) -> list[str]:
    """What the tables mean, and what follows from them."""
    costs, others = compare_costs(comparisons)
    trained = in_training(others)
    found = [f"{STEP_LEGEND} {COST_LEGEND}"] if costs else []
    if trained:
        peak = GPU_PEAK if trained[0].row.device == "cuda" else CPU_PEAK
        measured = any(c.row.peak_bytes is not None for c in trained)
        parts = ("" if costs else STEP_LEGEND, TRAINING_LEGEND, peak if measured else "", curves_line(trained))
        found.append(" ".join(filter(None, parts)))
    if by_operation(others):
        found.append(CALLS_LEGEND)
    return [*found, *filter(None, [bar_summary(others), fused_bar(others)])]


def model_tables(rows: Sequence[Row]) -> list[Table]:
    """For the terminal: a line that is slower than torch's is red."""
    tables = []
    comparisons = compare_models(rows)
    for suite in dict.fromkeys(c.row.suite for c in comparisons):
        members = [c for c in comparisons if c.row.suite == suite]
        for labels, heads, lines in sheets(members):
            table = Table(title=suite, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
            for index, head in enumerate(heads):
                table.add_column(head.replace(", ", "\n"), justify="left" if index < labels else "right", no_wrap=True)
            for cells in lines:
                ratios = [index for index, head in enumerate(heads) if head.startswith("x torch")]
                for index in ratios:
                    if cells[index] and float(cells[index].split()[0]) < 1:
                        cells[index] = f"[red]{cells[index]}[/red]"
                table.add_row(*cells)
            tables.append(table)
    return tables


def model_notes(rows: Sequence[Row]) -> list[str]:
    return [*notes(compare_models(rows)), how_measured(rows)]


def model_markdown(rows: Sequence[Row]) -> str:
    """The block of a README, of one suite's rows."""
    comparisons = compare_models(rows)
    blocks = []
    for labels, heads, lines in sheets(comparisons):
        rule = ["---"] * labels + ["--:"] * (len(heads) - labels)
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))
        folded = f"<details><summary>Every model</summary>\n\n{table}\n\n</details>"
        blocks.append(folded if len(lines) > FOLDED_LINES else table)
    device = "--device cuda " if rows[0].device == "cuda" else ""
    command = f"python -m benchmarks {device}--suite {rows[0].suite}"
    measured = f"Measured by `{command}` on {how_measured(rows)}."
    return "\n\n".join([*blocks, *notes(comparisons), measured])
