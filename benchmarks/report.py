"""What the rows say: bnext against torch and against the copy, a case at a time and as geometric means."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import NamedTuple

from benchmarks.rows import CLOCK, GRAPH, InputError, Row
from benchmarks.suites import PLAIN, TENSOR_PASSES, Epilogue, Shape, tensor_bytes, tensor_label

MB = 1_000_000

# Providers that are not measured everywhere.
NO_CUDNN = "torch-no-cudnn"
TORCH_COMPILE = "torch-compile"
PLANNED = "bnext-"  # bnext as planned for a lesser device; benchmarks/cuda/providers.py

# On a CPU the C library maps every output above 32 MB afresh; below 1 MB a core's own cache holds the tensor.
LARGE_CLASS = "> 32 MB"
SIZE_CLASSES = ((LARGE_CLASS, 32 * MB), ("1-32 MB", MB), ("< 1 MB", 0))


@dataclass(frozen=True)
class Comparison:
    """The providers' rows of one operation on one tensor."""

    torch: Row
    bnext: Row
    copy: Row
    others: Mapping[str, Row] = field(default_factory=dict)  # those not measured everywhere

    @property
    def op(self) -> str:
        return self.bnext.op

    @property
    def shape(self) -> Shape:
        return self.bnext.shape

    @property
    def label(self) -> str:
        """The shape, and what follows the batch norm."""
        return tensor_label(self.shape, self.bnext.epilogue)

    @property
    def group(self) -> "Group":
        # An (N,C) tensor is contiguous, but neither its traversal nor its speed is that of an image.
        layout = "(N,C)" if len(self.shape) == 2 else self.bnext.layout
        return Group(self.bnext.dtype, layout, self.bnext.mode, self.bnext.epilogue != PLAIN)

    @property
    def size_class(self) -> str:
        size = tensor_bytes(self.shape, self.bnext.dtype)
        return next(name for name, above in SIZE_CLASSES if size > above)

    @property
    def speedup(self) -> float:
        """torch's time / bnext's time."""
        return self.torch.median_s / self.bnext.median_s

    @property
    def over_copy(self) -> float:
        """bnext's time / the copy's time."""
        return self.bnext.median_s / self.copy.median_s

    def over(self, provider: str) -> float | None:
        """Another provider's time / bnext's time, where it was measured."""
        other = self.others.get(provider)
        return other.median_s / self.bnext.median_s if other else None


class Group(NamedTuple):
    """The rows of one table, the panels of one line of the plot."""

    dtype: str
    layout: str
    mode: str = CLOCK
    fused: bool = False  # with an activation in the same call

    @property
    def how(self) -> str:
        """The layout, the mode where there is more than one, and whether it is more than a batch norm."""
        parts = (self.layout, "" if self.mode == CLOCK else self.mode, "fused" if self.fused else "")
        return ", ".join(filter(None, parts))

    def __str__(self) -> str:
        return f"{self.dtype}, {self.how}"


@dataclass(frozen=True)
class Mean:
    """The geometric means of the comparisons of a group, an operation and a size class."""

    speedup: float
    over_copy: float
    worst_speedup: float
    shapes: int
    over_compile: float | None = None  # torch.compile's time / bnext's, over the shapes it was measured on


class MeanKey(NamedTuple):
    group: Group
    size_class: str
    op: str


def compare(rows: Iterable[Row]) -> list[Comparison]:
    """Put the providers of each measurement side by side, in the order of the rows.

    Raises InputError where a provider is missing or measured twice: means over such a file would be wrong.
    """
    measured: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row.suite, row.op, row.shape, row.epilogue, row.dtype, row.layout, row.mode)
        providers = measured.setdefault(key, {})
        if row.provider in providers:
            raise InputError(f"{_label(row)} is there twice: one report shows one run")
        providers[row.provider] = row
    comparisons = []
    for providers in measured.values():
        missing = {"torch", "bnext", "copy"} - providers.keys()
        if missing:
            example = next(iter(providers.values()))
            raise InputError(f"{_label(example)}: no measurement of {', '.join(sorted(missing))} beside it")
        torch, bnext, copy = (providers.pop(name) for name in ("torch", "bnext", "copy"))
        comparisons.append(Comparison(torch, bnext, copy, providers))
    return comparisons


def _label(row: Row) -> str:
    return f"{row.provider} {row.op} {tensor_label(row.shape, row.epilogue)} {row.dtype} {row.layout}"


def device_times(rows: Sequence[Row]) -> list[Row]:
    """The rows to show where there is room for one mode: a graph's, in which Python has no part, if there are any."""
    return [row for row in rows if row.mode == GRAPH] or list(rows)


def groups(comparisons: Iterable[Comparison]) -> list[Group]:
    """The groups that occur, in the order of the rows, images before (N,C), fused ones last."""
    occurring = dict.fromkeys(comparison.group for comparison in comparisons)
    return sorted(occurring, key=lambda group: (group.fused, group.layout == "(N,C)"))


def operations(comparisons: Iterable[Comparison]) -> list[str]:
    """The operations that occur, in the order of TENSOR_PASSES."""
    occurring = {comparison.op for comparison in comparisons}
    return [operation for operation in TENSOR_PASSES if operation in occurring]


def geometric_means(comparisons: Sequence[Comparison]) -> dict[MeanKey, Mean]:
    """The means of every group, size class and operation that occurs, in reading order."""
    members: dict[MeanKey, list[Comparison]] = {}
    for group in groups(comparisons):
        for size_class, _ in SIZE_CLASSES:
            for op in operations(comparisons):
                chosen = [c for c in comparisons if (c.group, c.size_class, c.op) == (group, size_class, op)]
                if chosen:
                    members[MeanKey(group, size_class, op)] = chosen
    return {key: _mean(chosen) for key, chosen in members.items()}


def _mean(comparisons: Sequence[Comparison]) -> Mean:
    compiled = [over for c in comparisons if (over := c.over(TORCH_COMPILE)) is not None]
    return Mean(
        speedup=geometric_mean(c.speedup for c in comparisons),
        over_copy=geometric_mean(c.over_copy for c in comparisons),
        worst_speedup=min(c.speedup for c in comparisons),
        shapes=len(comparisons),
        over_compile=geometric_mean(compiled) if compiled else None,
    )


class HeldKey(NamedTuple):
    """A line of the table of memory."""

    dtype: str
    epilogue: Epilogue


class HeldShare(NamedTuple):
    """What a forward's graph holds beyond the arguments, in sizes of the input, over all shapes."""

    beyond_arguments: float
    of_it_result: float  # which the next layer holds as well


def held_shares(rows: Iterable[Row]) -> dict[HeldKey, dict[str, HeldShare]]:
    """By dtype and what follows the batch norm, by provider; a tensor that was timed in two modes counts twice."""
    chosen: dict[HeldKey, dict[str, list[Row]]] = {}
    for row in rows:
        if row.held_bytes is not None:
            chosen.setdefault(HeldKey(row.dtype, row.epilogue), {}).setdefault(row.provider, []).append(row)
    return {
        key: {provider: _held_share(members) for provider, members in providers.items()}
        for key, providers in chosen.items()
    }


def _held_share(rows: Sequence[Row]) -> HeldShare:
    size = sum(tensor_bytes(row.shape, row.dtype) for row in rows)
    result = sum(row.held_result_bytes or 0 for row in rows)
    return HeldShare((result + sum(row.held_bytes or 0 for row in rows)) / size, result / size)


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
