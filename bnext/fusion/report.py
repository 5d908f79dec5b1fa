"""What became of the batch norms of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from bnext.fusion.rewrite import Outcome

ITSELF = "(the module itself)"  # in place of a name


@dataclass
class Report:
    """What fusing did: (name, what) of what was fused, and (name, why not) of each batch norm that was not.

    A batch norm that is fused in one graph and left in another, in training and in evaluation, say, is in both.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    graphs: set[int] = field(default_factory=set)  # id() of the graphs that were captured and have run
    errors: list[str] = field(default_factory=list)  # because of which dynamo left code uncaptured

    def add(self, graph: int, outcomes: list[Outcome], name_of: Callable[[Outcome], str]) -> None:
        self.graphs.add(graph)
        for outcome in outcomes:
            entry, entries = (name_of(outcome), outcome.text), self.fused if outcome.fused else self.left
            if entry not in entries:
                entries.append(entry)

    def merge(self, other: Report, prefix: str) -> None:
        """Add the report of a part, whose names get a prefix."""
        self.graphs |= other.graphs
        self.errors += other.errors
        self.fused += [(prefix + name, what) for name, what in other.fused]
        self.left += [(prefix + name, why) for name, why in other.left]

    def __str__(self) -> str:
        lines = [f"{len({name for name, _ in self.fused})} batch norm(s) fused, in {len(self.graphs)} graph(s)"]
        lines += [f"  {name}: {what}" for name, what in self.fused]
        if self.left:
            lines += ["left as they are:", *(f"  {name}: {why}" for name, why in self.left)]
        return "\n".join(lines)
