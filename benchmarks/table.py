"""The tables on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.report import Comparison, Group, compare, geometric_means, groups, how_measured, operations
from benchmarks.rows import Row
from benchmarks.suites import shape_label, tensor_bytes

# In a narrower terminal, or a log, lines may wrap; rich would cut numbers instead.
MIN_WIDTH = 140


def print_tables(rows: Sequence[Row]) -> None:
    """Every shape, a table a group; then the geometric means; then how it was measured."""
    comparisons = compare(rows)
    console = Console(width=max(Console().width, MIN_WIDTH))
    for group in groups(comparisons):
        console.print(shape_table(group, [c for c in comparisons if c.group == group]))
    console.print(means_table(comparisons))
    print("x torch: torch's time / bnext's. x copy: bnext's time / that of a copy of the same bytes.")
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
            *key.group,
            key.size_class,
            key.op,
            str(mean.shapes),
            coloured(mean.speedup),
            coloured(mean.worst_speedup),
            ratio(mean.over_copy),
        )
    return table
