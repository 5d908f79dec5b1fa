"""The tables on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bars import COPY, TORCH, Verdict, has_bars, summary, verdicts
from benchmarks.report import (
    NO_CUDNN,
    TORCH_COMPILE,
    Comparison,
    Group,
    compare,
    geometric_means,
    groups,
    how_measured,
    operations,
)
from benchmarks.rows import Row
from benchmarks.suites import shape_label, tensor_bytes

# In a narrower terminal, or a log, lines may wrap; rich would cut numbers instead.
MIN_WIDTH = 140


def print_tables(rows: Sequence[Row]) -> None:
    """Every shape, a table a group; then the geometric means; then how it was measured, and what a GPU's bars say."""
    comparisons = compare(rows)
    console = Console(width=max(Console().width, MIN_WIDTH))
    make_table = measurement_table if has_bars(comparisons) else shape_table
    for group in groups(comparisons):
        console.print(make_table(group, [c for c in comparisons if c.group == group]))
    console.print(means_table(comparisons))
    print("x torch: torch's time / bnext's. x copy: bnext's time / that of a copy of the same bytes.")
    if has_bars(comparisons):
        print("no cuDNN, compile: the time of torch without cuDNN, of torch.compile, / bnext's.")
        print("bars: bnext's time is at most so many times the copy's, that of torch with or without cuDNN.")
        print(f"{summary(verdicts(comparisons))}.")
    for row in rows:
        if row.note:
            what = f"{row.suite} {shape_label(row.shape)} {row.dtype} {row.layout} {row.op} {row.mode}"
            print(f"{what}: {row.provider} {row.note}")
    print(how_measured(rows))


def shape_table(group: Group, comparisons: Sequence[Comparison]) -> Table:
    table = Table(title=str(group), title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    table.add_column("shape", no_wrap=True, vertical="bottom")
    ops = operations(comparisons)
    headers = [header for op in ops for header in (" +\n".join(op.split("_")) + "\nms", "x torch", "x copy")]
    for header in ("MB", *headers):
        table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
    by_tensor: dict[tuple[str, tuple[int, ...]], dict[str, Comparison]] = {}
    for comparison in comparisons:
        by_tensor.setdefault((comparison.bnext.suite, comparison.shape), {})[comparison.op] = comparison
    for (_, shape), by_op in by_tensor.items():
        cells = [shape_label(shape), f"{tensor_bytes(shape, group.dtype) / 1e6:.2f}"]
        for op in ops:
            cells += _cells(by_op[op]) if op in by_op else ["", "", ""]
        table.add_row(*cells)
    return table


def measurement_table(group: Group, comparisons: Sequence[Comparison]) -> Table:
    """A line a measurement: with rates, other providers and bars, operations beside each other would be too wide."""
    table = Table(title=str(group), title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for header in ("suite", "shape", "operation"):
        table.add_column(header, no_wrap=True)
    for header in ("MB", "us", "GB/s", "x torch", "no cuDNN", "compile", "x copy"):
        table.add_column(header, justify="right", no_wrap=True)
    for bar in (COPY, TORCH):
        table.add_column(f"{bar} bar", justify="right", no_wrap=True)
    previous = None
    for comparison in comparisons:
        row = comparison.bnext
        tensor = (row.suite, row.shape)
        if previous not in (None, tensor):
            table.add_section()
        others = (comparison.over(NO_CUDNN), comparison.over(TORCH_COMPILE))
        endings = {verdict.bar: _ending(verdict) for verdict in verdicts([comparison])}
        table.add_row(
            *(("", "") if previous == tensor else (row.suite, shape_label(row.shape))),
            row.op,
            f"{tensor_bytes(row.shape, row.dtype) / 1e6:.2f}",
            f"{row.median_s * 1e6:.4g}",
            f"{row.gb_per_s:.0f}",
            coloured(comparison.speedup),
            *("" if over is None else coloured(over) for over in others),
            ratio(comparison.over_copy),
            *(endings.get(bar, "") for bar in (COPY, TORCH)),
        )
        previous = tensor
    return table


def _ending(verdict: Verdict) -> str:
    return f"{verdict.limit:g} {'pass' if verdict.passed else '[red]MISS[/red]'}"


def _cells(comparison: Comparison) -> list[str]:
    milliseconds = f"{comparison.bnext.median_s * 1e3:.4g}"
    return [milliseconds, coloured(comparison.speedup), ratio(comparison.over_copy)]


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def coloured(speedup: float) -> str:
    """Slower than torch is what the eye should find first."""
    return f"[red]{ratio(speedup)}[/red]" if speedup < 1 else ratio(speedup)


def means_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="geometric means", title_justify="left", box=box.SIMPLE)
    for header in ("dtype", "layout", "tensor", "operation"):
        table.add_column(header, no_wrap=True)
    for header in ("shapes", "x torch", "x torch, worst", "x copy"):
        table.add_column(header, justify="right", no_wrap=True)
    previous = None
    for key, mean in geometric_means(comparisons).items():
        if previous not in (None, key.group):
            table.add_section()
        previous = key.group
        table.add_row(
            key.group.dtype,
            key.group.how,
            key.size_class,
            key.op,
            str(mean.shapes),
            coloured(mean.speedup),
            coloured(mean.worst_speedup),
            ratio(mean.over_copy),
        )
    return table
