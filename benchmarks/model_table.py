"""The tables of whole models, on the terminal and in a README."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from benchmarks.model_report import (
    ModelComparison,
    bar_summary,
    by_operation,
    compare_models,
    curves_line,
    images_per_s,
    in_training,
)
from benchmarks.report import MB, how_measured
from benchmarks.rows import Row

Cells = list[str]
MODEL_HEADS = ("model", "input", "dtype", "layout")

TRAINING_LEGEND = (
    "A step is forward, loss, backward and SGD with momentum, on one batch. x torch: the time with torch's layers / "
    "the provider's, eager against eager, compiled against compiled."
)
CPU_PEAK = "Peak: resident memory of a process that does nothing else, beyond what it had before there was a model."
GPU_PEAK = "Peak: allocated memory of a process that does nothing else."
CALLS_LEGEND = "x torch: the time with torch's layers / that with bnext's, both compiled."


def training_lines(comparisons: Iterable[ModelComparison]) -> tuple[Cells, list[Cells]]:
    """Header and lines, the numbers from the sixth column on."""
    heads = [*MODEL_HEADS, "layers", "ms a step", "20-80 %", "images/s", "x torch", "peak MB", "last loss"]
    lines = []
    for c in in_training(comparisons):
        row = c.row
        lines.append(
            [
                *c.case,
                row.provider,
                f"{row.median_s * 1e3:.1f}",
                f"{row.p20_s * 1e3:.1f}-{row.p80_s * 1e3:.1f}",
                f"{images_per_s(row):.1f}",
                f"{c.speedup:.2f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / MB:.0f}",
                f"{row.losses[-2]:.4f}" if row.losses else "",
            ]
        )
    return heads, lines


def call_lines(comparisons: Sequence[ModelComparison]) -> tuple[Cells, list[Cells]]:
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
    return heads, lines


def notes(comparisons: Sequence[ModelComparison]) -> list[str]:
    """What the tables mean, and what follows from them."""
    found = []
    if in_training(comparisons):
        peak = GPU_PEAK if comparisons[0].row.device == "cuda" else CPU_PEAK
        found.append(f"{TRAINING_LEGEND} {peak} {curves_line(comparisons)}".strip())
    if by_operation(comparisons):
        found.append(CALLS_LEGEND)
    return [*found, *filter(None, [bar_summary(comparisons)])]


def model_tables(rows: Sequence[Row]) -> list[Table]:
    """For the terminal: a line that is slower than torch's is red."""
    tables = []
    comparisons = compare_models(rows)
    for suite in dict.fromkeys(c.row.suite for c in comparisons):
        members = [c for c in comparisons if c.row.suite == suite]
        for heads, lines in (training_lines(members), call_lines(members)):
            if not lines:
                continue
            table = Table(title=suite, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
            for index, head in enumerate(heads):
                table.add_column(head.replace(", ", "\n"), justify="left" if index < 5 else "right", no_wrap=True)
            for cells in lines:
                ratios = [index for index, head in enumerate(heads) if head == "x torch"]
                for index in ratios:
                    if cells[index] and float(cells[index]) < 1:
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
    for heads, lines in (training_lines(comparisons), call_lines(comparisons)):
        if lines:
            rule = ["---"] * 5 + ["--:"] * (len(heads) - 5)
            blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)))
    device = "--device cuda " if rows[0].device == "cuda" else ""
    command = f"python -m benchmarks {device}--suite {rows[0].suite}"
    measured = f"Measured by `{command}` on {how_measured(rows)}."
    return "\n\n".join([*blocks, *notes(comparisons), measured])
