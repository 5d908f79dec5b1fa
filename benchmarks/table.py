"""The tables on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.bars import BARS, Verdict, has_bars, mean_verdicts, on_gpu, summary, verdicts
from benchmarks.model_report import of_models, of_tensors
from benchmarks.model_table import model_notes, model_tables
from benchmarks.report import (
    NO_CUDNN,
    PLANNED,
    TORCH_COMPILE,
    Comparison,
    Group,
    compare,
    geometric_means,
    groups,
    held_shares,
    how_measured,
    operations,
)
from benchmarks.rows import Row
from benchmarks.suites import shape_label, tensor_bytes, tensor_label

# In a narrower terminal, or a log, lines may wrap; rich would cut numbers instead.
MIN_WIDTH = 140


def print_tables(rows: Sequence[Row]) -> None:
    """Of batch norms, then of whole models."""
    console = Console(width=max(Console().width, MIN_WIDTH))
    tensors, models = of_tensors(rows), of_models(rows)
    if tensors:
        print_tensor_tables(console, tensors)
    if models:
        for table in model_tables(models):
            console.print(table)
        print("\n".join(model_notes(models)))


def print_tensor_tables(console: Console, rows: Sequence[Row]) -> None:
    """Every shape, a table a group; then the geometric means and the memory; then how it was measured, and the bars."""
    comparisons = compare(rows)
    for group in groups(comparisons):
        members = [c for c in comparisons if c.group == group]
        make_table = measurement_table if has_bars(members[0]) else shape_table
        console.print(make_table(group, members))
    console.print(means_table(comparisons))
    if any(row.held_bytes is not None for row in rows):
        console.print(held_table(rows))
    print("x torch: torch's time / bnext's. x copy: bnext's time / that of a copy of the same bytes.")
    if any(map(on_gpu, comparisons)):
        print("no cuDNN, compile, and bnext planned as said: the time of torch without cuDNN, ... / bnext's.")
        print("bars: bnext's time is at most so many times the copy's, that of torch with or without cuDNN.")
    elif any(map(has_bars, comparisons)):
        print("compile: the time of torch.compile / bnext's. bars: bnext is at least so many times faster.")
    found = verdicts(comparisons)
    if found:
        print(f"{summary(found)}.")
    for verdict in mean_verdicts(comparisons):
        print(verdict)
    for row in rows:
        if row.note:
            what = f"{row.suite} {tensor_label(row.shape, row.epilogue)} {row.dtype} {row.layout} {row.op} {row.mode}"
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
    endings = [{verdict.bar: _ending(verdict) for verdict in verdicts([c])} for c in comparisons]
    bars = [bar for bar in BARS if any(bar in ending for ending in endings)]
    others = {"no cuDNN": NO_CUDNN, "compile": TORCH_COMPILE}
    planned = dict.fromkeys(name for c in comparisons for name in c.others if name.startswith(PLANNED))
    others |= {name.removeprefix(PLANNED): name for name in planned}
    others = {header: name for header, name in others.items() if any(name in c.others for c in comparisons)}
    for header in ("suite", "shape", "operation"):
        table.add_column(header, no_wrap=True)
    for header in ("MB", "us", "GB/s", "x torch", *others, "x copy", *(f"{bar} bar" for bar in bars)):
        table.add_column(header, justify="right", no_wrap=True)
    if any(c.bnext.plan for c in comparisons):
        table.add_column("plan", no_wrap=True)
    previous = None
    for comparison, ending in zip(comparisons, endings, strict=True):
        row = comparison.bnext
        tensor = (row.suite, comparison.label)
        if previous not in (None, tensor):
            table.add_section()
        overs = [comparison.over(name) for name in others.values()]
        table.add_row(
            *(("", "") if previous == tensor else tensor),
            row.op,
            f"{tensor_bytes(row.shape, row.dtype) / 1e6:.2f}",
            four_digits(row.median_s * 1e6),
            four_digits(row.gb_per_s),
            coloured(comparison.speedup),
            *("" if over is None else coloured(over) for over in overs),
            ratio(comparison.over_copy),
            *(ending.get(bar, "") for bar in bars),
            *([row.plan] if row.plan else []),
        )
        previous = tensor
    return table


def _ending(verdict: Verdict) -> str:
    return f"{verdict.limit:g} {'pass' if verdict.passed else '[red]MISS[/red]'}"


def _cells(comparison: Comparison) -> list[str]:
    milliseconds = f"{comparison.bnext.median_s * 1e3:.4g}"
    return [milliseconds, coloured(comparison.speedup), ratio(comparison.over_copy)]


def four_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def coloured(speedup: float) -> str:
    """Slower than torch is what the eye should find first."""
    return f"[red]{ratio(speedup)}[/red]" if speedup < 1 else ratio(speedup)


def means_table(comparisons: Sequence[Comparison]) -> Table:
    means = geometric_means(comparisons)
    with_compile = any(mean.over_compile is not None for mean in means.values())
    table = Table(title="geometric means", title_justify="left", box=box.SIMPLE)
    for header in ("dtype", "layout", "tensor", "operation"):
        table.add_column(header, no_wrap=True)
    for header in ("shapes", "x torch", "x torch, worst", *(["compile"] if with_compile else []), "x copy"):
        table.add_column(header, justify="right", no_wrap=True)
    previous = None
    for key, mean in means.items():
        if previous not in (None, key.group):
            table.add_section()
        previous = key.group
        over_compile = "" if mean.over_compile is None else coloured(mean.over_compile)
        table.add_row(
            key.group.dtype,
            key.group.how,
            key.size_class,
            key.op,
            str(mean.shapes),
            coloured(mean.speedup),
            coloured(mean.worst_speedup),
            *([over_compile] if with_compile else []),
            ratio(mean.over_copy),
        )
    return table


def held_table(rows: Sequence[Row]) -> Table:
    """What is held from forward to backward, a line a dtype and activation, two columns a provider."""
    shares = held_shares(rows)
    providers = list(dict.fromkeys(provider for by_provider in shares.values() for provider in by_provider))
    title = "held by the graph after forward, beyond the arguments, in sizes of the input"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for header in ("dtype", "after batch norm"):
        table.add_column(header, no_wrap=True)
    for provider in providers:
        table.add_column(provider, justify="right", no_wrap=True)
        table.add_column("of it the result", justify="right", no_wrap=True)
    for key, by_provider in shares.items():
        cells: list[str] = []
        for provider in providers:
            share = by_provider.get(provider)
            cells += [f"{part:.3f}" for part in share] if share else ["", ""]
        table.add_row(key.dtype, str(key.epilogue), *cells)
    return table
