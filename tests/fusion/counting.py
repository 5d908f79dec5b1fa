"""What of a model could be fused, what was, and whose its batch norms are: read off the autograd graph of one training
forward, which says what ran whatever the mechanism was.

- A batch norm is a node of that kind, torch's or bnext's.
- A pair, which could be fused, is an activation that batch norm can apply, whose input is a batch norm that nothing
  else uses, or a sum that nothing else uses with such a batch norm in it (of the same shape, alpha 1).
- What is left of the original's pairs in the converted model's graph is not fused: a fused activation is no node.

What uses a value is what comes between it and the outputs, or being one. An in-place activation is a node as any other.
A reentrant checkpoint hides what is inside it, and is an error.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Node = Any  # torch.autograd.graph.Node, whose attributes are the saved values of its kind


class Pair(NamedTuple):
    """An activation behind batch norms: one, or those among the two operands of a sum. They are known by their
    parameters."""

    act: str
    summed: bool
    norms: frozenset[str]

    def __str__(self) -> str:
        return " + ".join(sorted(self.norms)) + (" -> add -> " if self.summed else " -> ") + self.act


@dataclass(frozen=True)
class Census:
    norms: int
    ours: int  # of these, bnext's
    pairs: list[Pair]


def tensors(output: object) -> list[Tensor]:
    """What a model gives: a tensor, or a dict or tuple of them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def activation(node: Node) -> str | None:
    """Which of the activations that batch norm can apply a node is, if any."""
    kind = node.name().rstrip("0123456789")
    if kind == "HardtanhBackward":
        return "relu6" if (node._saved_min_val, node._saved_max_val) == (0, 6) else None
    if kind == "EluBackward":  # selu and celu are made of it, too
        return "elu" if (node._saved_scale, node._saved_input_scale) == (1, 1) else None
    if kind == "GeluBackward":
        return "gelu" if node._saved_approximate == "none" else None
    return {
        "ReluBackward": "relu",
        "LeakyReluBackward": "leaky_relu",
        "SiluBackward": "silu",
        "HardswishBackward": "hardswish",
        "MishBackward": "mish",
    }.get(kind)


def is_ours(node: Node) -> bool:
    return node.name().startswith("BNext")


def is_norm(node: Node) -> bool:
    return "BatchNorm" in node.name()


def is_sum(node: Node) -> bool:
    return node.name() == "AddBackward0" and node._saved_alpha == 1


def _shape(node: Node, index: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[index].shape)


def sources(node: Node) -> list[tuple[Node, int]]:
    """The values that a node was applied to: the nodes they come from, and which of their results they are."""
    return [(source, index) for source, index in node.next_functions if source is not None]


def nodes(outputs: Iterable[Tensor]) -> list[Node]:
    """All that the outputs hang on."""
    # A node is the same object for as long as something holds it.
    found: dict[Node, None] = {}
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += [source for source, _ in sources(node)]
    return list(found)


class _Graph:
    def __init__(self, model: nn.Module, outputs: list[Tensor]) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.nodes = nodes(outputs)
        if any(node.name() == "CheckpointFunctionBackward" for node in self.nodes):
            raise ValueError("a reentrant checkpoint hides what is inside it")
        self.uses = Counter((t.grad_fn, t.output_nr) for t in outputs if t.grad_fn is not None)
        self.uses.update(source for node in self.nodes for source in sources(node))

    def name(self, norm: Node) -> str:
        """That of a batch norm's layer, by way of its weight or bias."""
        for source, _ in norm.next_functions[1:]:
            name = self.names.get(getattr(source, "variable", None))
            if name is not None:
                return name.rpartition(".")[0]
        return "?"

    def pairs(self) -> Iterable[Pair]:
        for node in self.nodes:
            act = activation(node)
            if act is None:
                continue
            # Where its gradient goes: the value it was applied to.
            source, index = node.next_functions[0]
            if source is None or self.uses[source, index] != 1:
                continue
            summed = is_sum(source)
            terms = source.next_functions if summed else [(source, index)]
            norms = frozenset(
                self.name(term)
                for term, i in terms
                if term is not None
                and is_norm(term)
                and self.uses[term, i] == 1
                and all(other is not None and _shape(other, j) == _shape(source, 0) for other, j in terms)
            )
            if norms:
                yield Pair(act, summed, norms)


def census(model: nn.Module, outputs: list[Tensor]) -> Census:
    """Of a forward with gradients, of which these are the outputs, before it goes back."""
    graph = _Graph(model, outputs)
    norms = [node for node in graph.nodes if is_norm(node)]
    return Census(len(norms), sum(map(is_ours, norms)), sorted(graph.pairs(), key=str))


def left(original: Census, converted: Census) -> list[Pair]:
    """The pairs of the original that are pairs still.

    A batch norm with an activation looks as one without: `act(sum)` with a fused one among its terms is a pair for the
    census, but not one of the original's, which has fewer batch norms or none.
    """
    remaining = defaultdict(list)
    for pair in converted.pairs:
        remaining[pair.act, pair.summed].append(pair)
    found = []
    for pair in original.pairs:
        candidates = remaining[pair.act, pair.summed]
        match = min((c for c in candidates if c.norms >= pair.norms), key=lambda c: len(c.norms), default=None)
        if match is not None:
            candidates.remove(match)
            found.append(pair)
    return found
