"""Which memory the nodes of a captured graph share, and what they write to.

The graphs of ``torch._dynamo`` are not functionalised: a node may write to its arguments, or return a view of one. The
memory of a value is that of the fake tensor which dynamo computed for it (``meta["example_value"]``).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

# Tensors of these types have no memory but their storage; other subclasses may share memory in ways of their own.
_PLAIN = (torch._subclasses.FakeTensor, Tensor, torch.nn.Parameter)

# Functions that write to arguments although neither a name nor a flag says so: these arguments' positions and names.
_WRITES_BY_NATURE: dict[Any, tuple[tuple[int, str], ...]] = {
    F.batch_norm: ((1, "running_mean"), (2, "running_var")),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var")),
    F.instance_norm: ((1, "running_mean"), (2, "running_var")),
    torch.instance_norm: ((3, "running_mean"), (4, "running_var")),
    F.embedding: ((1, "weight"),),  # with max_norm
    F.embedding_bag: ((1, "weight"),),
    operator.setitem: ((0, ""),),
}
# In these modules the name or an argument of every other function tells whether it writes.
_TRUSTED: tuple[str, ...] = (
    "torch",
    "torch.nn.functional",
    "torch.functional",
    "torch._C._nn",
    "torch._C._fft",
    "torch._C._linalg",
)
_TRUSTED += ("torch._C._special", "_operator", "operator", "math", "builtins")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


def value(node: Any) -> Any:
    """What dynamo computed for a node: a fake tensor, a tuple of them, or anything else."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def tensor(node: Any) -> Tensor | None:
    """The node's value, if it is a dense tensor and no subclass's."""
    found = value(node)
    return found if type(found) in _PLAIN and found.layout == torch.strided else None


def memory(node: Any) -> frozenset[int]:
    """The memory that a node's value lies in: a number for each storage."""
    return frozenset(
        leaf.untyped_storage()._cdata
        for leaf in tree_leaves(value(node))
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided
    )


def is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method", "call_module")


def changes_mode(node: fx.Node) -> bool:
    """Whether a node enters or leaves autocast, a grad mode or the like: a call without a value."""
    return (
        node.op == "call_function"
        and "example_value" not in node.meta
        and not isinstance(node.target, torch._ops.OperatorBase)
        and not _is_operator(node.target)
    )


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def written(node: fx.Node) -> list[fx.Node] | None:
    """The arguments that a node may write to; None: that is not known."""
    if not is_call(node):
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments
        marked = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        return _nodes(argument(node, i, name) for i, name in marked)
    if node.op == "call_module" or isinstance(target, torch._ops.OperatorBase | torch._ops.OpOverloadPacket):
        return None
    if target in _WRITES_BY_NATURE:
        return _nodes(argument(node, i, name) for i, name in _WRITES_BY_NATURE[target])
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op == "call_function" and getattr(target, "__module__", "") not in _TRUSTED:
        return None
    found = [node.kwargs.get("out")]
    # Functions in Python may take `inplace` by position, among their last arguments: so any True counts as `inplace`.
    if _says_in_place(name, target) or node.kwargs.get("inplace") or any(flag is True for flag in node.args[1:]):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    return _nodes(found)


def _says_in_place(name: str, target: Any) -> bool:
    if name.startswith("__"):
        return (name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")) or name == "__setitem__"
    if _is_operator(target):
        return name.startswith("i") and hasattr(operator, f"__{name}__") and name not in ("index", "inv", "invert")
    return name.endswith("_")


def _is_operator(target: Any) -> bool:
    return getattr(target, "__module__", "") in ("_operator", "operator")


def _nodes(values: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, fx.Node)]
