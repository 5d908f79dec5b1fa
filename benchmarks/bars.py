"""The bars: how close to a copy of the same bytes bnext has to be on a GPU, and how much faster than torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.report import LARGE_CLASS, NO_CUDNN, TORCH_COMPILE, Comparison
from benchmarks.rows import GRAPH
from benchmarks.suites import is_fused_layer

COPY, TORCH, COMPILE = "copy", "torch", "compile"
BARS = (COPY, TORCH, COMPILE)

# bnext's time / the time of a copy of as many bytes as the single-read model has: 2 S forward, 3 S backward.
# Of each tensor, and of the geometric mean over the suite in each layout.
COPY_LIMITS = {"forward": 1.6, "eval": 1.25, "backward": 1.6}
COPY_MEAN_LIMITS = {"forward": 1.15, "backward": 1.2}
COPY_SUITE, COPY_DTYPE = "resnet50-256", "bfloat16"

# The time of torch's eager functions, with or without cuDNN, whichever is less, / bnext's: everywhere.
TORCH_LIMIT = 1.0

# Of a batch norm with an activation: the times of torch's eager functions and of torch.compile / bnext's. On a CPU for
# each tensor of the largest class; on a GPU in the geometric mean over ResNet-50's fused layers.
FUSED_OP = "forward_backward"
CPU_FUSED_LIMITS = {TORCH: 3.0, COMPILE: 8.0}
CUDA_FUSED_LIMITS = {TORCH: 2.0, COMPILE: 1.3}
CUDA_FUSED = ("bfloat16", "channels_last", GRAPH)


@dataclass(frozen=True)
class Verdict:
    """One bar, and what was measured against it."""

    bar: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Against the copy it is how many times its time, which is to be small; otherwise how many times faster."""
        return self.value <= self.limit if self.bar == COPY else self.value >= self.limit


@dataclass(frozen=True)
class MeanVerdict(Verdict):
    """One bar for a geometric mean over so many shapes of a suite."""

    measured: Comparison  # one of them
    shapes: int

    def __str__(self) -> str:
        ending = "pass" if self.passed else "MISS"
        row = self.measured.bnext
        how = ", ".join((row.suite, row.op.replace("_", " + "), row.dtype, row.layout, row.mode))
        return f"{how}, {self.shapes} shapes: {self.value:.2f} x {self.bar}, bar {self.limit:g}: {ending}"


def copy_limit(comparison: Comparison) -> float | None:
    """The bar is about the device's own time on the tensors of one network; None elsewhere."""
    row = comparison.bnext
    if (row.suite, row.dtype, row.mode) != (COPY_SUITE, COPY_DTYPE, GRAPH):
        return None
    return COPY_LIMITS.get(row.op)


def over_torch(comparison: Comparison) -> float:
    """torch's least time / bnext's."""
    rows = [comparison.torch, *(row for name, row in comparison.others.items() if name == NO_CUDNN)]
    return min(row.median_s for row in rows) / comparison.bnext.median_s


def on_gpu(comparison: Comparison) -> bool:
    return comparison.bnext.device == "cuda"


def has_bars(comparison: Comparison) -> bool:
    """On a CPU there are none for a plain batch norm."""
    return on_gpu(comparison) or comparison.group.fused


def verdicts(comparisons: Iterable[Comparison]) -> list[Verdict]:
    """The bars of each measurement, in the order of the comparisons."""
    found = []
    for comparison in filter(has_bars, comparisons):
        large = not on_gpu(comparison) and comparison.op == FUSED_OP and comparison.size_class == LARGE_CLASS
        limits = CPU_FUSED_LIMITS if large else {TORCH: TORCH_LIMIT}
        limit = copy_limit(comparison)
        if limit:
            found.append(Verdict(COPY, comparison.over_copy, limit))
        found.append(Verdict(TORCH, over_torch(comparison), limits[TORCH]))
        over_compile = comparison.over(TORCH_COMPILE)
        if over_compile is not None and COMPILE in limits:
            found.append(Verdict(COMPILE, over_compile, limits[COMPILE]))
    return found


def mean_verdicts(comparisons: Sequence[Comparison]) -> list[MeanVerdict]:
    """The bars of the geometric means on a GPU."""
    return [*copy_verdicts(comparisons), *fused_verdicts(comparisons)]


def copy_verdicts(comparisons: Iterable[Comparison]) -> list[MeanVerdict]:
    """Those against the copy, a layout and an operation after the other."""
    means: dict[tuple[str, str], list[Comparison]] = {}
    for c in filter(on_gpu, comparisons):
        if copy_limit(c) and c.op in COPY_MEAN_LIMITS:
            means.setdefault((c.bnext.layout, c.op), []).append(c)
    return [
        MeanVerdict(COPY, geometric_mean(c.over_copy for c in chosen), COPY_MEAN_LIMITS[op], chosen[0], len(chosen))
        for (_, op), chosen in means.items()
    ]


def fused_verdicts(comparisons: Iterable[Comparison]) -> list[MeanVerdict]:
    """Those of fused layers, a suite after the other; torch.compile's where it was measured on all shapes."""
    suites: dict[str, list[Comparison]] = {}
    for c in filter(on_gpu, comparisons):
        row = c.bnext
        listed = (row.dtype, row.layout, row.mode) == CUDA_FUSED and is_fused_layer(row.shape, row.epilogue)
        if listed and row.op == FUSED_OP:
            suites.setdefault(row.suite, []).append(c)
    found = []
    for chosen in suites.values():
        speedups = {TORCH: [c.speedup for c in chosen], COMPILE: [c.over(TORCH_COMPILE) for c in chosen]}
        for bar, values in speedups.items():
            measured = [value for value in values if value is not None]
            if len(measured) == len(chosen):
                found.append(MeanVerdict(bar, geometric_mean(measured), CUDA_FUSED_LIMITS[bar], chosen[0], len(chosen)))
    return found


def summary(found: Sequence[Verdict]) -> str:
    """A line that says of each bar how many measurements pass it."""
    parts = []
    for bar in BARS:
        passed = [verdict.passed for verdict in found if verdict.bar == bar]
        if passed:
            parts.append(f"{sum(passed)} of {len(passed)} pass the bar against {bar}")
    return "; ".join(parts)
