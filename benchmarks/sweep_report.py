"""The report on the sweep: where bnext is slower than torch, and where its time jumps between neighbours on the grid.

A point is one tensor and one operation. bnext counts as slower if the 20th percentile of its rounds is above the 80th
of torch's, so that the spread of the rounds does not explain the difference.

A step is a point that takes more than ``STEP`` times as long as a neighbour predicts. Neighbours are one notch apart on
one axis of the grid. A call's time is an overhead, and a rest that grows with the tensor:

    predicted = overhead + (time of the neighbour - overhead) * growth

The overhead is the least time of any point of that dtype, layout and operation. The growth is that of the bytes, or
that of a copy's time for these bytes if that is more, because the copy outgrows a cache where bnext does. The point's
time is its 20th percentile, and the neighbour's its 80th.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from benchmarks.rows import Row
from benchmarks.suites import BNEXT, COPY, TORCH
from benchmarks.tables import Sheet, foldable, how_measured, markdown, mean_of, texts
from benchmarks.traffic import MB, shape_label, tensor_bytes

GROUP = ["dtype", "layout", "op"]
AXES = ["n", "c", "side"]
STEP = 1.5

LEGEND = (
    "x torch: torch's time / bnext's. Slower: beyond the spread of that point's rounds. Step: a point that takes more "
    f"than {STEP:g} times as long as the one beside it on the grid predicts, by overhead, bytes and the copy's time."
)


def points(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per point that bnext, torch and the copy were timed on, in the order of the rows.

    Each provider has its median in a column of its name, and the percentiles in those with ``_low`` and ``_high``.
    """
    measured = pd.DataFrame([vars(row) for row in rows])
    measured[AXES] = [(*shape, 1)[:3] for shape in measured["shape"]]
    providers = []
    for name in (BNEXT, TORCH, COPY):
        of_one = measured[measured["provider"] == name].set_index([*GROUP, *AXES])
        columns = {"median_s": name, "p20_s": f"{name}_low", "p80_s": f"{name}_high"}
        columns |= {"shape": "shape", "bytes": "bytes"} if name == BNEXT else {}
        providers.append(of_one[list(columns)].rename(columns=columns))
    table = pd.concat(providers, axis=1, join="inner").reset_index()
    table["speedup"] = table[TORCH] / table[BNEXT]
    table["slower"] = table[f"{BNEXT}_low"] > table[f"{TORCH}_high"]
    table["overhead"] = table.groupby(GROUP)[BNEXT].transform("min")
    return table


def steps(table: pd.DataFrame) -> pd.DataFrame:
    """One line per step of such points, the highest first; columns with ``_beside`` are of the neighbour that predicts
    least."""
    pairs = []
    for axis in AXES:
        notches = sorted(table[axis].unique())
        for order in (notches, notches[::-1]):
            moved = table[axis].map(dict(pairwise(order)))
            beside = table.assign(**{axis: moved}).dropna(subset=[axis])
            pairs.append(table.merge(beside, on=[*GROUP, *AXES], suffixes=("", "_beside")))
    found = pd.concat(pairs, ignore_index=True)
    growth = np.maximum(found["bytes"] / found["bytes_beside"], found[COPY] / found[f"{COPY}_beside"])
    predicted = found["overhead"] + (found[f"{BNEXT}_high_beside"] - found["overhead"]) * growth
    found["step"] = found[f"{BNEXT}_low"] / predicted
    found = found[found["step"] > STEP].sort_values("step", ascending=False)
    return found.drop_duplicates([*GROUP, *AXES])


def cells(table: pd.DataFrame, beside: str = "") -> dict[str, Sequence[str]]:
    """The columns that show a point and its time; with ``_beside``, those of the neighbour that predicts it."""
    shape = table[f"shape{beside}"]
    size = [tensor_bytes(*tensor) / MB for tensor in zip(shape, table["dtype"], strict=True)]
    words = beside.replace("_", " ")
    return {
        f"tensor{words}": shape.map(shape_label).tolist(),
        f"MB{words}": texts(size, "{:.2f}"),
        f"us{words}": texts(table[f"{BNEXT}{beside}"] * 1e6, "{:.1f}"),
        f"x torch{words}": texts(table[f"speedup{beside}"], "{:.2f}"),
    }


def groups(table: pd.DataFrame) -> dict[str, Sequence[str]]:
    return {"dtype": table["dtype"].tolist(), "layout": table["layout"].tolist(), "operation": table["op"].tolist()}


def slower_lines(table: pd.DataFrame) -> Sheet:
    """One line per point where bnext is slower, the slowest first."""
    slower = table[table["slower"]].sort_values("speedup")
    return Sheet(pd.DataFrame({**groups(slower), **cells(slower)}), labels=4)


def step_lines(found: pd.DataFrame) -> Sheet:
    step = texts(found["step"], "{:.2f}")
    return Sheet(pd.DataFrame({**groups(found), "step": step, **cells(found), **cells(found, "_beside")}), labels=3)


def summary_lines(table: pd.DataFrame, found: pd.DataFrame) -> Sheet:
    """One line per dtype, layout and operation."""
    columns = {"points": ("speedup", "size"), "slower": ("slower", "sum"), "worst": ("speedup", "min")}
    lines = table.groupby(GROUP, sort=False).agg(**columns, mean=("speedup", mean_of))
    lines["steps"] = found.groupby(GROUP).size().reindex(lines.index, fill_value=0)
    lines = lines.reset_index()
    shown = {
        **groups(lines),
        "points": texts(lines["points"], "{}"),
        "slower than torch": texts(lines["slower"], "{}"),
        "worst x torch": texts(lines["worst"], "{:.2f}"),
        "geometric mean": texts(lines["mean"], "{:.2f}"),
        "steps": texts(lines["steps"], "{}"),
    }
    return Sheet(pd.DataFrame(shown), labels=3)


def block(rows: Sequence[Row]) -> str:
    """The summary, the points that are slower than torch and the steps as Markdown."""
    table = points(rows)
    found = steps(table)
    parts = [
        f"{len(table)} points. bnext is slower than torch at {table['slower'].sum()} of them; the worst runs at "
        f"{table['speedup'].min():.2f} of torch's speed, the geometric mean at {mean_of(table['speedup']):.2f}. "
        f"{len(found)} steps.",
        markdown(summary_lines(table, found)),
    ]
    for title, sheet in {"Slower than torch": slower_lines(table), "Steps": step_lines(found)}.items():
        parts += [f"{title}:", foldable(sheet, "Every point")] if len(sheet.cells) else []
    return "\n\n".join([*parts, LEGEND, how_measured(rows)])
