"""What padding and ghost batches cost: each provider's time / that of batch norm of the whole tensor."""

from collections.abc import Sequence

import pandas as pd

from benchmarks.acceptance import VARIANT_LIMITS
from benchmarks.rows import Row
from benchmarks.suites import BNEXT, BNEXT_BY_HAND, TORCH_BY_HAND, WHOLE
from benchmarks.tables import (
    Sheet,
    foldable,
    how_measured,
    markdown,
    mean_and_range,
    mean_of,
    operation_label,
    spread,
    texts,
)
from benchmarks.traffic import shape_label

KEYS = ["variant", "dtype", "layout", "tensor", "op"]
WAYS = (BNEXT, BNEXT_BY_HAND, TORCH_BY_HAND)
LEGEND = (
    "Times / that of plain, bnext's batch norm of the whole tensor, which knows of no padding and no parts. By hand: "
    "the values that are no padding are gathered by a mask that is there, normalised as (values, C) and put back "
    "into zeros; ghost batches are torch.cat of the batch norms of the parts. Lengths, and both sides of the "
    "rectangles, are from half to full, the random mask has 80 % of the values, and ghost batches have 32 parts. A "
    "sequence in channels_last lies in memory as (N, L, C)."
)


def compare(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per measurement, a variant after the other: plain's seconds, and each provider's median and, with
    ``_low`` and ``_high``, 20th and 80th percentile as multiples of them."""
    order = list(VARIANT_LIMITS)
    measured = pd.DataFrame([vars(row) for row in sorted(rows, key=lambda row: order.index(row.variant))])
    measured["tensor"] = measured["shape"].map(shape_label)
    measured = measured.set_index([*KEYS, "provider"])
    table = spread(measured["median_s"])[[WHOLE]]
    for field, suffix in (("median_s", ""), ("p20_s", "_low"), ("p80_s", "_high")):
        seconds = spread(measured[field]).reindex(columns=list(WAYS))
        table = table.join(seconds.div(table[WHOLE], axis=0).add_suffix(suffix))
    return table.reset_index()


def mean_lines(table: pd.DataFrame) -> Sheet:
    """One line per variant and operation, with bnext's bar."""
    lines = []
    for (variant, op), found in table.groupby(["variant", "op"], sort=False):
        limit = VARIANT_LIMITS[variant]
        verdict = "pass" if mean_of(found[BNEXT]) <= limit else "MISS"
        cells = {way: mean_and_range(found[way].dropna()) for way in WAYS}
        lines.append({"batch": variant, "operation": operation_label(op), **cells, "bar": f"{limit:g} {verdict}"})
    return Sheet(pd.DataFrame(lines), labels=2)


def single_lines(table: pd.DataFrame) -> Sheet:
    """One line per measurement; in brackets the 20th and 80th percentile."""
    cells = {
        "batch": table["variant"],
        **table[["dtype", "layout", "tensor"]],
        "operation": table["op"].map(operation_label),
        "plain, ms": texts(table[WHOLE] * 1e3, "{:.3f}"),
    }
    for way in WAYS:
        spreads = table[[way, f"{way}_low", f"{way}_high"]].to_numpy()
        cells[way] = [
            "" if pd.isna(median) else f"{median:.2f} ({low:.2f}-{high:.2f})" for median, low, high in spreads
        ]
    return Sheet(pd.DataFrame(cells), labels=5)


def block(rows: Sequence[Row]) -> str:
    """The means with their bars and every measurement as Markdown."""
    table = compare(rows)
    within = table[BNEXT] <= table["variant"].map(VARIANT_LIMITS)
    parts = [
        markdown(mean_lines(table)),
        f"Geometric means, and the range. {LEGEND}",
        f"Bars, of the means: bnext's time is at most so many times plain's. {within.sum()} of {len(table)} single "
        "measurements are within them.",
        foldable(single_lines(table), "Every measurement, in brackets the 20th and 80th percentile of the rounds"),
    ]
    return "\n\n".join([*parts, how_measured(rows)])
