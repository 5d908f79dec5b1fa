"""How many activations of a model could be fused, and how many were: read off the autograd graph of a forward in
training, which says what ran, whatever mechanism fused it.

A pair, which could be fused, is an activation that batch norm can apply, and its input, which nothing else uses. The
input is a batch norm, or a sum (of operands of one shape, alpha 1) of which one operand is a batch norm that nothing
else uses. A fused activation has no node of its own. In-place activations have nodes as others do.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

Node = Any  # torch.autograd.graph.Node, whose attributes are the saved values of its kind


def tensors(output: object) -> list[Tensor]:
    """The tensors among what a model returns: a tensor, or a dict or tuple of them."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def is_activation(node: Node) -> bool:
    """Whether the node is that of an activation that batch norm can apply."""
    kind = node.name().rstrip("0123456789")
    if kind == "HardtanhBackward":
        return (node._saved_min_val, node._saved_max_val) == (0, 6)
    if kind == "EluBackward":  # selu and celu are made of elu
        return (node._saved_scale, node._saved_input_scale) == (1, 1)
    if kind == "GeluBackward":
        return node._saved_approximate == "none"
    return kind.removesuffix("Backward") in ("Relu", "LeakyRelu", "Silu", "Hardswish", "Mish")


def is_norm(node: Node) -> bool:
    return "BatchNorm" in node.name()


def is_sum(node: Node) -> bool:
    return node.name() == "AddBackward0" and node._saved_alpha == 1


def nodes(output: object) -> list[Node]:
    """All nodes that the tensors of an output depend on."""
    found: dict[Node, None] = {}  # a node is the same Python object for as long as something holds it
    waiting = [t.grad_fn for t in tensors(output)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [source for source, _ in node.next_functions]
    return list(found)


def count(output: object) -> int:
    """How many activations that batch norm can apply an output depends on."""
    return sum(map(is_activation, nodes(output)))


def count_sums(output: object) -> int:
    return sum(map(is_sum, nodes(output)))


def count_norms(output: object) -> tuple[int, int]:
    """How many batch norms an output depends on, and how many of these are bnext's."""
    norms = [node.name() for node in nodes(output) if is_norm(node)]
    return len(norms), sum(name.startswith("BNext") for name in norms)


def count_pairs(output: object) -> int:
    """How many of the activations that an output depends on could be fused."""
    found = nodes(output)
    uses = Counter((t.grad_fn, t.output_nr) for t in tensors(output))
    uses.update(source for node in found for source in node.next_functions)

    def is_used_once(source: Node, index: int) -> bool:
        return source is not None and uses[source, index] == 1

    def is_pair(act: Node) -> bool:
        source, index = act.next_functions[0]
        if not is_used_once(source, index):
            return False
        if not is_sum(source):
            return is_norm(source)
        operands = source.next_functions
        shapes = {None if each is None else tuple(each._input_metadata[i].shape) for each, i in operands}
        return shapes == {tuple(source._input_metadata[0].shape)} and any(
            is_norm(each) and is_used_once(each, i) for each, i in operands
        )

    return sum(is_pair(node) for node in found if is_activation(node))
