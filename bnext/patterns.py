"""BN → act and BN → add → act, recognised in a graph and replaced there."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bnext import activations, forwards, functional, modules
from bnext.activations import Act
from bnext.sync import SyncBatchNorm

# Layers that can be fused, once they are bnext's, and what they become.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    modules.BatchNorm1d: modules.BatchNormAct1d,
    modules.BatchNorm2d: modules.BatchNormAct2d,
    modules.BatchNorm3d: modules.BatchNormAct3d,
    SyncBatchNorm: SyncBatchNorm,
}

# Their output is a new tensor, which nobody else holds, and they leave their input as it is.
_FRESH = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_FRESH_FUNCTIONS = {
    nn.functional.conv1d,
    nn.functional.conv2d,
    nn.functional.conv3d,
    nn.functional.linear,
    nn.functional.batch_norm,
}

_ADDS = {operator.add, operator.iadd, torch.add}
_BATCH_NORM = torch.nn.functional.batch_norm

# Functions, and the names of methods.
_FUNCTIONS: dict[object, str] = {
    nn.functional.relu: "relu",
    nn.functional.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    nn.functional.silu: "silu",
    nn.functional.gelu: "gelu",
    nn.functional.hardswish: "hardswish",
    nn.functional.leaky_relu: "leaky_relu",
    nn.functional.leaky_relu_: "leaky_relu",
    "relu": "relu",
    "relu_": "relu",
}


def fusible(module: nn.Module | None) -> bool:
    """Whether a layer can be fused, and is not."""
    return type(module) in LAYERS and getattr(module, "act", None) is None


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or replaces the calls of this very module."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


def activation_of(module: nn.Module) -> Act:
    """What BatchNormAct calls this activation; None where it does not know it, and for the identity."""
    try:
        act = activations.of_module(module)
    except ValueError:
        return None
    return None if act == "identity" else act


def _leaky_relu(slope: object) -> Act:
    try:
        activations.parse(("leaky_relu", slope))  # type: ignore[arg-type]
    except ValueError:
        return None
    return ("leaky_relu", slope)  # type: ignore[return-value]


def is_sequential(module: nn.Module) -> bool:
    """An nn.Sequential, or a subclass that leaves its forward."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def last_of(module: nn.Module) -> nn.Module | None:
    """The module whose output a plain Sequential returns."""
    while is_sequential(module) and not hooked(module):
        if not module._modules:
            return None
        module = module[-1]  # type: ignore[index]
    return module


def label(act: Act) -> str:
    return str(activations.parse(act))


@dataclass
class Match:
    """``activation`` of ``bn``, or of its sum with ``residual``."""

    bn: fx.Node
    act: Act
    activation: fx.Node
    sum: fx.Node | None = None
    residual: fx.Node | None = None
    changed: str = ""  # the operand that the sum is written to: "output" is the batch norm's, or "residual"

    def __str__(self) -> str:
        return f"bn -> add -> {label(self.act)}" if self.sum is not None else f"bn -> {label(self.act)}"


class Graph:
    """A traced forward, with the modules that it calls."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.left: dict[fx.Node, str] = {}  # batch norms that are added and activated, but not alone so

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Every call of a submodule."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                yield node, self.root.get_submodule(node.target)

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def functions(self) -> list[fx.Node]:
        """Every call of ``torch.nn.functional.batch_norm``."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target is _BATCH_NORM]

    def matches(self) -> list[Match]:
        """What could be fused, the calls of a Sequential that ends with a batch norm counted as that."""
        self.left.clear()
        position = {node: i for i, node in enumerate(self.graph.nodes)}
        found: dict[fx.Node, Match] = {}
        for node in self.graph.nodes:
            act, value = self._activation(node)
            if act is None or value is None or not _only_user(value, node):
                continue
            module = self.module(node)
            if module is not None and hooked(module):
                self.left[value] = "the activation behind it has hooks"
                continue
            if self._is_batch_norm(value):
                match = Match(value, act, node)
            elif (operands := _operands(value)) is not None:
                sum_match = self._sum(value, operands, position)
                if sum_match is None:
                    continue
                match = Match(sum_match.bn, act, node, value, sum_match.residual, sum_match.changed)
            else:
                continue
            found.setdefault(match.bn, match)
        return list(found.values())

    def _is_batch_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is None:
            return node.op == "call_function" and node.target is _BATCH_NORM and _first(node) is not None
        last = last_of(module)
        return fusible(last) and _first(node) is not None

    def _activation(self, node: fx.Node) -> tuple[Act, fx.Node | None]:
        """(which, of what); Nones for any other node."""
        module = self.module(node)
        value = _first(node)
        if value is None:
            return None, None
        if module is not None:
            return activation_of(module), value
        if node.op not in ("call_function", "call_method"):
            return None, None
        name = _FUNCTIONS.get(node.target)
        options: dict[int | str, object] = dict(enumerate(node.args[1:]))
        options.update(node.kwargs)
        options.pop("input", None)
        options.pop("inplace", None)
        if name == "leaky_relu":
            slope = options.pop(0, options.pop("negative_slope", 0.01))
            options.pop(1, None)
            return (None if options else _leaky_relu(slope)), value
        if name == "gelu":
            return (name if options.pop("approximate", "none") == "none" and not options else None), value
        options.pop(0, None)  # inplace
        return (None if options else name), value

    def _sum(self, node: fx.Node, operands: tuple[fx.Node, fx.Node], position: dict[fx.Node, int]) -> Match | None:
        candidates = [n for n in operands if self._is_batch_norm(n)]
        # A layer before the end of a Sequential, whose calls then stay; then the later one, which moves less.
        candidates.sort(key=lambda n: (isinstance(self.module(n), nn.Sequential), -position[n]))
        for bn in candidates:
            residual = operands[1] if bn is operands[0] else operands[0]
            changed = ""
            if node.target in (operator.iadd, "add_"):
                changed = "output" if bn is operands[0] else "residual"
            reason = self._obstacle(bn, node, residual, changed)
            if reason is None:
                return Match(bn, None, node, node, residual, changed)
            self.left[bn] = reason
        return None

    def _obstacle(self, bn: fx.Node, sum: fx.Node, residual: fx.Node, changed: str) -> str | None:
        if residual is bn:
            return "it is added to itself"
        if not _only_user(bn, sum):
            return "its output has another use than the sum"
        if not self._may_have_its_shape(residual):
            return "what is added to it may have another shape"
        if isinstance(self.module(bn), nn.Sequential):
            return None  # to be asked again, of the layer at its end
        if changed == "residual" and not (self._is_fresh(residual) and _only_user(residual, sum)):
            return "the sum is written to the other operand, which others may hold"
        if self._may_change_between(bn, sum):
            return "what happens before the sum may change its input"
        return None

    def _may_have_its_shape(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "call_module"):
            return True
        if self._activation(node)[0] is not None or _operands(node) is not None:
            return True
        return node.op == "call_function" and node.target in (_BATCH_NORM, torch.cat, nn.functional.pad)

    def _is_fresh(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is None:
            return node.op == "call_function" and node.target in _FRESH_FUNCTIONS
        return not hooked(module) and type(module) in (*_FRESH, *LAYERS)

    def _may_change_between(self, bn: fx.Node, sum: fx.Node) -> bool:
        """Whether the batch norm, computed at the sum, could see another input or other running statistics."""
        layer, value = self.module(bn), _first(bn)
        between = []
        node = bn.next
        while node is not sum:
            between.append(node)
            node = node.next
        for node in between:
            module = self.module(node)
            if module is not None and layer is not None and any(m is layer for m in module.modules()):
                return True
            if node.op == "get_attr" and layer is not None and str(node.target).startswith(f"{bn.target}."):
                return True
            if node.target is _BATCH_NORM and layer is None:
                return True  # it may update the same statistics
        if value is not None and self._is_fresh(value) and _only_user(value, bn):
            return False
        return not all(n.op == "get_attr" or self._is_fresh(n) for n in between)


def _first(node: fx.Node) -> fx.Node | None:
    """The first argument, where it is a value."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_module" and len(node.args) + len(node.kwargs) != 1:
        return None
    return first if isinstance(first, fx.Node) else None


def _only_user(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of a plain sum of two values; None for any other node."""
    if not (
        (node.op == "call_function" and node.target in _ADDS)
        or (node.op == "call_method" and node.target in ("add", "add_"))
    ):
        return None
    options = dict(node.kwargs)
    operands = [*node.args, *(options.pop(key) for key in ("input", "other") if key in options)]
    if options.pop("alpha", 1) != 1 or options or len(operands) != 2:
        return None
    a, b = operands
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b else None


def rewrite(graph: fx.Graph, matches: list[Match], is_layer: Callable[[fx.Node], bool]) -> None:
    """Replace each match by one call, and every other ``torch.nn.functional.batch_norm`` by bnext's."""
    for match in matches:
        bn = match.bn
        place = match.sum if match.sum is not None else bn
        with graph.inserting_before(place):
            new = _fused_call(graph, match, is_layer(bn))
        match.activation.replace_all_uses_with(new)
        for node in (match.activation, match.sum, bn):
            if node is not None:
                graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _BATCH_NORM:
            node.target = functional.batch_norm


def _fused_call(graph: fx.Graph, match: Match, is_layer: bool) -> fx.Node:
    bn = match.bn
    args: tuple[Any, ...]
    if is_layer:
        layer = graph.create_node("get_attr", str(bn.target))
        args = (layer, _first(bn))
        if match.sum is None:
            return graph.call_function(forwards.batch_norm_act, args)
        return graph.call_function(forwards.batch_norm_add_act, (*args, match.residual, match.changed))
    bound = inspect.signature(functional.batch_norm).bind(*bn.args, **bn.kwargs)
    bound.apply_defaults()
    tensors, options = bound.args[:5], bound.args[5:]
    if match.sum is None:
        return graph.call_function(functional.batch_norm_act, (*tensors, None, *options, match.act))
    return graph.call_function(
        forwards.functional_add_act, (*tensors, match.residual, *options, match.act, match.changed)
    )
