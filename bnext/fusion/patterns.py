"""What the pass looks for in a graph: batch norms, activations, and sums of two values."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bnext import _C, ops
from bnext.activations import NAMES, SLOPES, Activation
from bnext.batches import Batch
from bnext.functional import DTYPES
from bnext.fusion.effects import tensor, value

_DEVICES = ("cpu", "cuda") if _C.cuda else ("cpu",)

OPERATORS = (ops.batch_norm_train, ops.batch_norm_eval, ops.batch_norm_sync)
_BY_FUNCTION = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}
_DEFAULTS = {"training": False, "momentum": 0.1, "eps": 1e-5}

_ADDS = (operator.add, torch.add, "add", "__add__", "__radd__")
_IN_PLACE_ADDS = (operator.iadd, "add_", "__iadd__")


class Left(Exception):  # noqa: N818 - an answer, not an error
    """Why a batch norm is left as it is."""


def require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise Left(otherwise)


@dataclass(frozen=True)
class BatchNorm:
    """A call of a batch norm, as bnext's operator takes it, without what follows the normalisation."""

    node: fx.Node
    output: fx.Node  # the node of the normalised value: of an operator with several results, the first of them
    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments

    @property
    def input(self) -> fx.Node:
        node: fx.Node = self.arguments[0]
        return node

    @property
    def statistics(self) -> tuple[fx.Node, ...]:
        """The running statistics and the counter, which training writes to."""
        return tuple(a for a in self.arguments[3:6] if isinstance(a, fx.Node))

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        return tuple(a for a in (*self.arguments, *self.options.values()) if isinstance(a, fx.Node))

    def call(self, graph: fx.Graph, *epilogue: Any) -> tuple[fx.Node, fx.Node]:
        """Put the operator into the graph. Returns the nodes of the call and of the output."""
        node = graph.call_function(self.operator, (*self.arguments, *epilogue), self.options)
        if self.operator is ops.batch_norm_sync:
            return node, node
        return node, graph.call_function(operator.getitem, (node, 0))


def is_batch_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and (node.target in OPERATORS or node.target in _BY_FUNCTION)


def read_batch_norm(node: fx.Node) -> BatchNorm:
    """
    Raises:
        Left: bnext's operators do not take this batch norm, or it has an activation already.
    """
    found = _of_function(node) if node.target in _BY_FUNCTION else _of_operator(node)
    input = tensor(found.arguments[0])
    require(input is not None, "its input is no dense tensor")
    assert input is not None
    require(input.device.type in _DEVICES, f"bnext has no kernels for {input.device.type}")
    require(input.dim() >= 2 and input.dtype in DTYPES, f"its input is {input.dim()}-dimensional, {input.dtype}")
    for argument_ in found.arguments[1:5]:
        if argument_ is not None:
            vector = tensor(argument_)
            fits = vector is not None and vector.dtype in (torch.float32, input.dtype) and vector.device == input.device
            require(fits, "one of its vectors has another dtype or device")
    return found


def _of_operator(node: fx.Node) -> BatchNorm:
    given = ops.bind(node.target, node.args, node.kwargs)
    plain = given["residual"] is None and given["act"] == "identity" and not given.get("with_mask")
    require(plain, "it has an activation already")
    output = node
    if node.target is not ops.batch_norm_sync:
        # The bodies of higher-order operators keep nodes without users.
        for user in [user for user in node.users if not user.users and user.target is operator.getitem]:
            node.graph.erase_node(user)
        users = list(node.users)
        require(len(users) == 1 and users[0].args[1:] == (0,), "its statistics are used")
        output = users[0]
    arguments = tuple(given.values())[: list(given).index("residual")]
    options = {name: node.kwargs[name] for name in node.kwargs if name in Batch._fields}
    return BatchNorm(node, output, node.target, arguments, options)


def _of_function(node: fx.Node) -> BatchNorm:
    given = _DEFAULTS | dict(zip(_BY_FUNCTION[node.target], node.args, strict=False))  # type: ignore[index]
    given |= node.kwargs
    training, momentum, eps = given["training"], given["momentum"], given["eps"]
    require(isinstance(training, bool), "whether it trains is not known")
    require(_is_number(eps), "its eps is not known")
    vectors = tuple(given.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    if training:
        require(_is_number(momentum), "its momentum is not known")
        arguments = (given["input"], *vectors, None, momentum, eps)
        return BatchNorm(node, node, ops.batch_norm_train, arguments)
    require(None not in vectors[2:], "it evaluates without statistics")
    return BatchNorm(node, node, ops.batch_norm_eval, (given["input"], *vectors, eps))


def _is_number(setting: Any) -> bool:
    """Whether it is a number, or a node of one: dynamo turns a number that has changed into an input of the graph."""
    return isinstance(setting, int | float) or isinstance(value(setting), torch.SymFloat)


class Applied(NamedTuple):
    """An activation in a graph."""

    activation: Activation
    in_place: bool


# By name, the parameters between the input and ``inplace``.
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "relu": (),
    "relu6": (),
    "hardtanh": ("min_val", "max_val"),
    "leaky_relu": ("negative_slope",),
    "silu": (),
    "gelu": ("approximate",),
    "hardswish": (),
    "mish": (),
    "elu": ("alpha",),
}
_ACTIVATIONS: dict[Any, str] = {
    getattr(place, spelled): name
    for name in _PARAMETERS
    for place in (torch, F, torch._C._nn)
    for spelled in (name, f"{name}_")
    if hasattr(place, spelled)
} | {"relu": "relu", "relu_": "relu"}  # methods


def read_activation(node: fx.Node) -> Applied | None:
    """The activation that a node applies to its first argument, if bnext has it."""
    name = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None or not node.args:
        return None
    parameters = (*_PARAMETERS[name], "inplace")
    given = dict(zip(parameters, node.args[1:], strict=False)) | node.kwargs
    in_place = given.pop("inplace", False)
    if not isinstance(in_place, bool) or len(node.args) > 1 + len(parameters) or not given.keys() <= set(parameters):
        return None
    activation = _activation(name, given)
    if activation is None or activation.name not in NAMES:
        return None
    return Applied(activation, in_place or name_of(node).endswith("_"))


def _activation(name: str, given: dict[str, Any]) -> Activation | None:
    if name == "hardtanh":
        limits = (given.get("min_val", -1.0), given.get("max_val", 1.0))
        return Activation("relu6") if limits == (0, 6) else None
    if name == "gelu":
        return Activation(name) if given.get("approximate", "none") == "none" else None
    if name not in SLOPES:
        return Activation(name)
    slope = given.get(_PARAMETERS[name][0], SLOPES[name])
    return Activation(name, slope) if _is_number(slope) else None


class Sum(NamedTuple):
    """A sum in a graph: its other operand, and which of the two it is written to, if any."""

    residual: fx.Node
    into_norm: bool
    into_residual: bool


def read_sum(node: fx.Node, normalized: fx.Node) -> Sum:
    """
    Raises:
        Left: the node is no sum of the normalised value and another tensor of its shape and dtype.
    """
    in_place = node.target in _IN_PLACE_ADDS
    require(in_place or node.target in _ADDS, f"followed by {name_of(node)}")
    require(len(node.args) == 2 and not node.kwargs, "followed by a sum with a factor")
    first, second = node.args
    require(first is not second, "added to itself")
    residual = second if first is normalized else first
    require(isinstance(residual, fx.Node), "followed by a sum with a number")
    assert isinstance(residual, fx.Node)
    require(same(residual, normalized), "the residual has another shape, dtype or device")
    require(same(node, normalized), "the sum has another dtype")
    return Sum(residual, in_place and first is normalized, in_place and first is residual)


def same(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are known to have the same shape, dtype and device, without a new guard."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None or x.dim() != y.dim() or (x.dtype, x.device) != (y.dtype, y.device):
        return False
    return all(statically_known_true(i == j) for i, j in zip(x.shape, y.shape, strict=True))


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values of the same shape are known to have the same strides."""
    x, y = tensor(a), tensor(b)
    assert x is not None
    assert y is not None
    strides = zip(x.shape, x.stride(), y.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(i == j) for size, i, j in strides)


def name_of(node: fx.Node) -> str:
    """What a node calls, by the name that a user would call it by."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.name())
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))
