"""Tables: cells of text in a pandas frame, as Markdown and on the terminal; and what the reports share."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.rows import Row, is_touched
from benchmarks.suites import SWEEP, VARIANTS
from benchmarks.traffic import PLAIN

# In a narrower terminal, or a log, lines may wrap; rich would cut numbers instead.
MIN_WIDTH = 140
FOLDED_LINES = 24  # longer tables are folded


class Sheet(NamedTuple):
    """The first ``labels`` columns are text, the others numbers."""

    cells: pd.DataFrame
    labels: int


def texts(values: Iterable[object], form: str) -> list[str]:
    """Each value in a format, empty where it is NaN."""
    return ["" if pd.isna(value) else form.format(value) for value in values]


def spread(values: pd.Series) -> pd.DataFrame:
    """A column for each value of the index's last level; lines and columns in the order in which they come.

    Like ``unstack(sort=False)``, which in pandas before 3 mixes up the values.
    """
    lines, heads = values.index.droplevel(-1).unique(), values.index.unique(-1)
    return values.unstack().reindex(index=lines, columns=heads)


def mean_of(values: pd.Series) -> float:
    """The geometric mean of what was measured; NaN where nothing was."""
    return float(np.exp(np.log(values).mean()))


def mean_and_range(found: pd.Series) -> str:
    return "" if found.empty else f"{mean_of(found):.2f} ({found.min():.2f}-{found.max():.2f})"


def markdown(sheet: Sheet) -> str:
    heads = list(sheet.cells.columns)
    ruler = ["---"] * sheet.labels + ["--:"] * (len(heads) - sheet.labels)
    lines = (heads, ruler, *sheet.cells.itertuples(index=False, name=None))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def foldable(sheet: Sheet, what: str) -> str:
    """The table; a long one is folded under the heading ``what``."""
    text = markdown(sheet)
    folded = f"<details><summary>{what}</summary>\n\n{text}\n\n</details>"
    return folded if len(sheet.cells) > FOLDED_LINES else text


def print_markdown(text: str) -> None:
    Console(width=max(Console().width, MIN_WIDTH)).print(Markdown(text))


def operation_label(op: str) -> str:
    return op.replace("_", " + ")


def how_measured(rows: Sequence[Row]) -> str:
    """One line: the command, the machine, the versions, the commit, and how it was measured."""
    row = rows[0]
    command = "python -m benchmarks"
    command += " --device cuda" if row.device == "cuda" else ""
    command += " --touched" if is_touched(row.environment) else ""
    if row.model or row.epilogue != PLAIN or row.suite in (SWEEP, VARIANTS):
        command += f" --suite {','.join(dict.fromkeys(row.suite for row in rows))}"
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
    commits = ", ".join(dict.fromkeys(r.commit for r in rows))
    apart = any(r.page_faults is not None for r in rows)
    return (
        f"Measured by `{command}` on {row.device_name} ({machine}), {runs_on}, "
        f"torch {row.torch_version}, bnext {row.bnext_version}, Python {row.python_version}, "
        f"commit {commits}, {row.date[:10]}; median of {rounds} rounds, the providers in turn"
        f"{', each in a process of its own' if apart else ' in one process'}, {how}; {environment or allocator}."
    )
