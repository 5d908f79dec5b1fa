"""What batch norm costs a model in training, and how much of that is gone: torch's step against one without any."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

from benchmarks.model_report import ModelComparison, Sheet
from benchmarks.model_suites import COMPILE, EAGER_PROVIDERS, WITHOUT

OURS = EAGER_PROVIDERS[1:]
ALL = "all"

LEGEND = (
    "Before it is timed, the losses of a few are held against torch's. x torch: the time with torch's layers / the "
    "provider's, in the geometric mean, and the range over the models. Without: every batch norm replaced by nothing "
    "(activations stay). Cost gone: how much of what batch norm costs torch is gone, (torch - provider) / (torch - "
    "without); of several models the sum of each's share of its step."
)


@dataclass(frozen=True)
class Cost:
    """The eager providers of a case, WITHOUT and what it is compared with among them."""

    by_provider: Mapping[str, ModelComparison]

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.by_provider[WITHOUT].case

    @property
    def torch_s(self) -> float:
        return self.by_provider[WITHOUT].torch.median_s

    def saved(self, provider: str) -> float:
        """Of torch's time."""
        return 1 - 1 / self.by_provider[provider].speedup

    def gone(self, provider: str) -> float | None:
        """None where torch is not slower for its batch norms, or the provider was not measured."""
        return cost_gone([self], provider)


def compare_costs(comparisons: Iterable[ModelComparison]) -> tuple[list[Cost], list[ModelComparison]]:
    """The cases that were measured without batch norm, too, and all that does not belong to them."""
    found: dict[tuple[object, ...], dict[str, ModelComparison]] = {}
    for c in comparisons:
        compiled = c.row.provider.endswith(COMPILE)
        found.setdefault((compiled, c.row.suite, c.row.op, *c.case), {})[c.row.provider] = c
    costs = [Cost(members) for members in found.values() if WITHOUT in members]
    others = [c for members in found.values() if WITHOUT not in members for c in members.values()]
    return costs, others


def cost_gone(costs: Iterable[Cost], provider: str) -> float | None:
    measured = [cost for cost in costs if provider in cost.by_provider]
    could = sum(cost.saved(WITHOUT) for cost in measured)
    return sum(cost.saved(provider) for cost in measured) / could if could > 0 else None


def cost_means(costs: Sequence[Cost]) -> Sheet:
    """A line a dtype and layout, and one of all."""
    heads = ["dtype", "layout", "models", *(f"x torch, {name}" for name in (*OURS, WITHOUT))]
    groups: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        groups.setdefault(cost.case[2:], []).append(cost)
    if len(groups) > 1:
        groups[ALL, ALL] = list(costs)
    lines = []
    for group, members in groups.items():
        speedups = (_speedups(members, name) for name in (*OURS, WITHOUT))
        models = len({cost.case[0] for cost in members})
        lines.append([*group, f"{models}", *speedups, *(_percent(cost_gone(members, name)) for name in OURS)])
    return Sheet(3, [*heads, *(f"cost gone, {name}" for name in OURS)], lines)


def cost_lines(costs: Sequence[Cost]) -> Sheet:
    """A line a case."""
    heads = ["model", "input", "dtype", "layout", "torch, ms", *(f"x torch, {name}" for name in (*OURS, WITHOUT))]
    lines = []
    for cost in costs:
        found = (cost.by_provider.get(name) for name in (*OURS, WITHOUT))
        speedups = (f"{c.speedup:.2f}" if c else "" for c in found)
        gone = (_percent(cost.gone(name)) for name in OURS)
        lines.append([*cost.case, f"{cost.torch_s * 1e3:.1f}", *speedups, *gone])
    return Sheet(4, [*heads, *(f"cost gone, {name}" for name in OURS)], lines)


def _speedups(costs: Iterable[Cost], provider: str) -> str:
    found = [cost.by_provider[provider].speedup for cost in costs if provider in cost.by_provider]
    return f"{geometric_mean(found):.2f} ({min(found):.2f}-{max(found):.2f})" if found else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
