"""The bars for a GPU: how close to a copy of the same bytes bnext has to be, and that torch is nowhere faster."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report import NO_CUDNN, Comparison
from benchmarks.rows import GRAPH

COPY, TORCH = "copy", "torch"

# bnext's time / the time of a copy of as many bytes as the single-read model has: 2 S forward, 3 S backward.
COPY_LIMITS = {"forward": 1.25, "eval": 1.25, "backward": 1.35}
LARGE_SIZE, LARGE_LIMIT = 112, 1.6  # a channel of 256 such planes fits no team's memory: part of it is read twice
COPY_SUITE, COPY_DTYPE = "resnet50-256", "bfloat16"

# bnext's time / that of torch's eager function, with or without cuDNN, whichever is faster.
TORCH_LIMIT = 1.0


@dataclass(frozen=True)
class Verdict:
    """One bar for one operation on one tensor."""

    bar: str
    comparison: Comparison
    ratio: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.ratio <= self.limit


def copy_limit(comparison: Comparison) -> float | None:
    """The bar is about the device's own time on the tensors of one network; None elsewhere."""
    row = comparison.bnext
    if (row.suite, row.dtype, row.mode) != (COPY_SUITE, COPY_DTYPE, GRAPH):
        return None
    limit = COPY_LIMITS.get(row.op)
    return LARGE_LIMIT if limit and row.shape[-1] == LARGE_SIZE else limit


def over_torch(comparison: Comparison) -> float:
    """bnext's time / torch's fastest."""
    rows = [comparison.torch, *(row for name, row in comparison.others.items() if name == NO_CUDNN)]
    return comparison.bnext.median_s / min(row.median_s for row in rows)


def has_bars(comparisons: Sequence[Comparison]) -> bool:
    """There are none for a CPU."""
    return comparisons[0].bnext.device == "cuda"


def verdicts(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The bars of what was measured, in the order of the comparisons."""
    if not has_bars(comparisons):
        return []
    found = []
    for comparison in comparisons:
        limit = copy_limit(comparison)
        if limit:
            found.append(Verdict(COPY, comparison, comparison.over_copy, limit))
        found.append(Verdict(TORCH, comparison, over_torch(comparison), TORCH_LIMIT))
    return found


def summary(found: Sequence[Verdict]) -> str:
    """A line that says of each bar how many measurements pass it."""
    parts = []
    for bar in (COPY, TORCH):
        passed = [verdict.passed for verdict in found if verdict.bar == bar]
        if passed:
            parts.append(f"{sum(passed)} of {len(passed)} pass the bar against {bar}")
    return "; ".join(parts)
