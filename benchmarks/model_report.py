"""What the rows of whole models say: each provider against torch's layers, eager against eager, compiled likewise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import NamedTuple

from benchmarks.model_suites import COMPILE, STEP
from benchmarks.rows import InputError, Row
from benchmarks.suites import shape_label

COMPILED_SUITE, SMALL_SUITE = "compiled", "small-models"
LIMIT = 1.0  # a compiled model is not slower with bnext, nor a small one for fusing


class Sheet(NamedTuple):
    """A table: the first columns are text, the others numbers."""

    labels: int
    heads: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class ModelComparison:
    """A provider's row of an operation of a model, beside the one with torch's layers."""

    row: Row
    torch: Row

    @property
    def speedup(self) -> float:
        """The time with torch's layers / the provider's."""
        return self.torch.median_s / self.row.median_s

    @property
    def is_torch(self) -> bool:
        return self.row == self.torch

    @property
    def has_bar(self) -> bool:
        return self.row.suite == COMPILED_SUITE and not self.is_torch

    @property
    def passed(self) -> bool:
        return self.speedup >= LIMIT

    @property
    def case(self) -> tuple[str, str, str, str]:
        """Model, input, dtype, layout."""
        return self.row.model, shape_label(self.row.shape), self.row.dtype, self.row.layout


def of_models(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.model]


def of_tensors(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.model]


def compare_models(rows: Iterable[Row]) -> list[ModelComparison]:
    """In the order of the rows; those without torch's beside them, as where it failed, are left out.

    Raises InputError where a provider was measured twice.
    """
    measured: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row.suite, row.model, row.op, row.shape, row.dtype, row.layout)
        providers = measured.setdefault(key, {})
        if row.provider in providers:
            what = f"{row.provider} {row.op} {row.model} {shape_label(row.shape)} {row.dtype} {row.layout}"
            raise InputError(f"{what} is there twice: one report shows one run")
        providers[row.provider] = row
    return [
        ModelComparison(row, providers[base])
        for providers in measured.values()
        for name, row in providers.items()
        if (base := "torch" + COMPILE * name.endswith(COMPILE)) in providers
    ]


def images_per_s(row: Row) -> float:
    return row.shape[0] / row.median_s


def in_training(comparisons: Iterable[ModelComparison]) -> list[ModelComparison]:
    return [c for c in comparisons if c.row.op == STEP]


def by_operation(comparisons: Iterable[ModelComparison]) -> dict[tuple[str, ...], dict[str, ModelComparison]]:
    """bnext's of models that are called rather than trained: a line a case and provider, a column an operation."""
    lines: dict[tuple[str, ...], dict[str, ModelComparison]] = {}
    for c in comparisons:
        if c.row.op != STEP and not c.is_torch:
            lines.setdefault((*c.case, c.row.provider), {})[c.row.op] = c
    return lines


def speedup_mean(comparisons: Sequence[ModelComparison]) -> float:
    return geometric_mean(c.speedup for c in comparisons)


def fused_bar(comparisons: Iterable[ModelComparison]) -> str:
    """A line, or nothing where no small model was measured."""
    small = {(c.case, c.row.provider): c for c in comparisons if c.row.suite == SMALL_SUITE}
    ratios = [
        small[case, "bnext"].row.median_s / c.row.median_s
        for (case, provider), c in small.items()
        if provider == "bnext-fused" and (case, "bnext") in small
    ]
    if not ratios:
        return ""
    passed = sum(ratio >= LIMIT for ratio in ratios)
    return (
        "Bar: a small model is not slower fused than with bnext's layers alone. bnext's time / bnext-fused's: "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}. {passed} of {len(ratios)} pass."
    )


def bar_summary(comparisons: Iterable[ModelComparison]) -> str:
    """A line, or nothing where there is no bar."""
    found = [c for c in comparisons if c.has_bar]
    if not found:
        return ""
    passed = sum(c.passed for c in found)
    return (
        "Bar: a compiled model is with bnext not slower than with torch alone. "
        f"{passed} of {len(found)} pass; geometric mean {speedup_mean(found):.2f}."
    )


def curves_line(comparisons: Sequence[ModelComparison]) -> str:
    """How far the losses of a case are from each other, at most; nothing where there are none."""
    curves: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for c in comparisons:
        if c.row.losses:
            curves.setdefault((c.row.suite, *c.case), []).append(c.row.losses)
    if not curves:
        return ""
    spread = max(max(at) - min(at) for members in curves.values() for at in zip(*members, strict=True))
    first, *steps, last = next(iter(curves.values()))[0]
    return (
        f"Losses of {len(steps) + 1} steps from {first:.4f} to {steps[-1]:.4f}, then {last:.4f} in evaluation; the "
        f"providers' differ by {spread:.1g} at most."
    )
