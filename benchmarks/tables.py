"""Tables: cells of text in a pandas frame, as Markdown and on the terminal; and what every report has in common."""

from collections.abc import Iterable, Sequence
from math import isnan, nan
from statistics import geometric_mean
from typing import NamedTuple

import pandas as pd
from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from benchmarks.rows import InputError, Row, is_touched
from benchmarks.suites import PLAIN, shape_label

# In a narrower terminal, or a log, lines may wrap; rich would cut numbers instead.
MIN_WIDTH = 140


class Sheet(NamedTuple):
    """The first ``labels`` columns are text, the others numbers."""

    cells: pd.DataFrame
    labels: int
    title: str = ""


def texts(values: Iterable[object], form: str) -> list[str]:
    """Each value in a format, nothing where there is none."""
    return ["" if pd.isna(value) else form.format(value) for value in values]


def mean_of(values: Iterable[float]) -> float:
    """The geometric mean of what was measured; NaN where nothing was."""
    known = [value for value in values if not isnan(value)]
    return geometric_mean(known) if known else nan


def markdown(sheet: Sheet) -> str:
    heads = list(sheet.cells.columns)
    ruler = ["---"] * sheet.labels + ["--:"] * (len(heads) - sheet.labels)
    lines = (heads, ruler, *sheet.cells.itertuples(index=False, name=None))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def terminal() -> Console:
    return Console(width=max(Console().width, MIN_WIDTH))


def print_markdown(text: str) -> None:
    terminal().print(Markdown(text))


def print_sheets(sheets: Iterable[Sheet]) -> None:
    """On the terminal, with what is slower than torch, or misses its bar, in red."""
    console = terminal()
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
        heads = list(sheet.cells.columns)
        for index, head in enumerate(heads):
            justify = "left" if index < sheet.labels else "right"
            table.add_column(head.replace(", ", "\n"), justify=justify, no_wrap=True)
        for line in sheet.cells.itertuples(index=False, name=None):
            table.add_row(
                *(f"[red]{cell}[/red]" if is_bad(head, cell) else cell for head, cell in zip(heads, line, strict=True))
            )
        console.print(table)


def is_bad(head: str, cell: str) -> bool:
    slower = head.startswith("x torch") and cell and float(cell.split()[0]) < 1
    return bool(slower) or cell.endswith("MISS")


def frame(rows: Sequence[Row], keys: Sequence[str]) -> pd.DataFrame:
    """One line per row; raises InputError where a provider was measured twice on what ``keys`` tell apart."""
    table = pd.DataFrame([vars(row) for row in rows])
    twice = table[table.duplicated([*keys, "provider"])]
    if not twice.empty:
        raise InputError(f"{row_label(twice.iloc[0])} is there twice: one report shows one run")
    return table


def row_label(row: pd.Series) -> str:
    """Provider, operation and tensor of a line of ``frame``."""
    parts = (row["provider"], row["op"], row["model"], shape_label(row["shape"]), row["dtype"], row["layout"])
    return " ".join(filter(None, parts))


def operation_label(op: str) -> str:
    return op.replace("_", " + ")


def command(rows: Sequence[Row]) -> str:
    """What measures such rows."""
    row = rows[0]
    parts = ["python -m benchmarks"]
    parts += ["--device cuda"] if row.device == "cuda" else []
    parts += ["--touched"] if is_touched(row.environment) else []
    named = row.model or row.epilogue != PLAIN
    parts += [f"--suite {','.join(dict.fromkeys(row.suite for row in rows))}"] if named else []
    return " ".join(parts)


def how_measured(rows: Sequence[Row]) -> str:
    """One line: the machine, the versions, the commit, and how it was measured."""
    row = rows[0]
    fewest, most = min(r.rounds for r in rows), max(r.rounds for r in rows)
    rounds = str(fewest) if fewest == most else f"{fewest} to {most}"
    environment = ", ".join(f"{name}={value}" for name, value in sorted(row.environment.items()))
    if row.device == "cuda":
        machine = f"{row.isa}, driver {row.driver_version or 'unknown'}"
        runs_on = f"CUDA {row.cuda_version}, cuDNN {row.cudnn_version or 'none'}"
        how = "outputs kept for a turn of the buffers, L2 cold"
        allocator = "allocator as it comes"
    else:
        machine = row.isa
        runs_on = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
        how = "outputs allocated at each call"
        allocator = "memory allocator as it comes, THP_MEM_ALLOC_ENABLE unset"
    return (
        f"{row.device_name} ({machine}), {runs_on}, "
        f"torch {row.torch_version}, bnext {row.bnext_version}, Python {row.python_version}, "
        f"commit {row.commit}, {row.date[:10]}; median of {rounds} rounds, the providers in turn in one "
        f"process, {how}; {environment or allocator}"
    )
