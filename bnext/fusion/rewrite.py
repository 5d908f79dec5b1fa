"""The pass: batch norm → activation, and batch norm → sum → activation, become one call of bnext's operator.

It works on graphs of torch's own functions, as ``torch._dynamo`` captures them, before they are functionalised: values
may be modified in place. Each condition for fusing a pair stands in a call of ``require``, beside the reason that the
report gives for a pair that does not meet it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from bnext import _C, ops
from bnext.fusion import effects, patterns
from bnext.fusion.effects import between, memory, written
from bnext.fusion.patterns import Applied, BatchNorm, Left, Sum, name_of, require

_logger = logging.getLogger("bnext")

_SHAPE_METHODS = ("size", "dim", "numel", "ndimension")


class Outcome(NamedTuple):
    """What the pass did with a batch norm, or why it did nothing."""

    module: int | None  # id() of the layer, if the graph knows it
    vectors: tuple[str, ...]  # the names of the graph's inputs that the call reads
    call: str  # how the captured code names the layer, or the function
    fused: bool
    text: str


def fuse(module: fx.GraphModule, for_compiler: bool = False) -> list[Outcome]:
    """Rewrite a captured graph in place, and those of its higher-order operators.

    ``for_compiler``: the graph is going to be compiled, so an evaluation without gradients is left to the compiler,
    which sees it as arithmetic and fuses it with more than an activation.
    """
    outcomes = []
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            outcomes += _Pass(part.graph, for_compiler, part is not module).run()
            part.recompile()
    return outcomes


class _Pass:
    def __init__(self, graph: fx.Graph, for_compiler: bool, within: bool) -> None:
        self.graph = graph
        self.for_compiler = for_compiler
        self.within = within  # another graph, as the body of a checkpoint, which is recomputed in backward
        self.mode: dict[fx.Node, int] = {}  # counts the changes of autocast and grad mode before a node
        changes = 0
        for node in graph.nodes:
            changes += effects.changes_mode(node)
            self.mode[node] = changes

    def run(self) -> list[Outcome]:
        outcomes = []
        for node in [node for node in self.graph.nodes if patterns.is_batch_norm(node)]:
            outcome = partial(Outcome, *_place_of(node))
            try:
                norm = patterns.read_batch_norm(node)
                if self._is_for_compiler(norm):
                    raise Left("an evaluation without gradients, which the compiler fuses as arithmetic")
            except Left as reason:
                outcomes.append(outcome(False, str(reason)))
                continue
            try:
                outcomes.append(outcome(True, self._fuse(norm)))
            except Left as reason:
                outcomes.append(outcome(False, str(reason)))
                if norm.node.target is not norm.operator:
                    self._replace(norm)
            except Exception as error:  # an unforeseen model runs unfused
                _logger.warning("a batch norm was left for an error of bnext's own, please report it", exc_info=True)
                outcomes.append(outcome(False, f"an error of bnext's own, {error!r}"))
        self.graph.lint()
        return outcomes

    def _is_for_compiler(self, norm: BatchNorm) -> bool:
        output = effects.value(norm.output)
        return self.for_compiler and norm.operator is ops.batch_norm_eval and not output.requires_grad

    def _fuse(self, norm: BatchNorm) -> str:
        """
        Raises:
            Left: it cannot be fused; nothing was changed.
        """
        names = {norm.output}  # the nodes whose value is that of the norm, or of the sum
        last, added = norm.output, None
        reader = self._first_reader(names, "value")
        applied = patterns.read_activation(reader)
        if applied is None:
            added, last = patterns.read_sum(reader, norm.output), reader
            names = self._names_of_sum(norm, added, last)
            reader = self._first_reader(names, "sum")
            applied = patterns.read_activation(reader)
            require(applied is not None, f"followed by a sum and {name_of(reader)}")
            assert applied is not None
            require(norm.options.get("valid") is None, "followed by a sum that is not 0 at padding")
            self._check_move(norm, last)
            self._check_residual(added, applied, last, reader)
        require(applied.in_place or self._readers(names) == [reader], "its value is used elsewhere, too")
        require(patterns.same(reader, norm.output), "the activation has another dtype")
        require(patterns.same_layout(reader, norm.output), "the result has another memory format")
        modes = {self.mode[node] for node in (norm.node, last, reader)}
        require(len(modes) == 1, "autocast or the grad mode changes in between")
        slope: Any = applied.activation.slope  # a node, if it has changed from one call to another
        known = not isinstance(slope, fx.Node) or slope < (last if added else norm.node)
        require(known, "the activation's slope is computed behind it")
        self._rewrite(norm, added, applied, last, reader, names)
        return f"batch norm{' + residual' if added else ''} -> {applied.activation}"

    def _names_of_sum(self, norm: BatchNorm, added: Sum, at: fx.Node) -> set[fx.Node]:
        if added.into_norm:
            return {norm.output, at}  # whoever reads the norm's value later reads the sum
        require(self._readers({norm.output}) == [at], "its value is used elsewhere, too")
        if added.into_residual:
            held = self._aliases(added.residual)
            require(
                not any(node.op in ("placeholder", "get_attr") for node in held)
                and all(user <= at for node in held if node < at for user in node.users),
                "the sum is written to a value that others hold",
            )
        return {at}

    def _check_move(self, norm: BatchNorm, place: fx.Node) -> None:
        """With a residual the norm moves to the sum's place, and reads its inputs and writes its statistics there."""
        inputs = frozenset().union(*map(memory, norm.inputs))
        updated = (
            frozenset() if norm.operator is ops.batch_norm_eval else frozenset().union(*map(memory, norm.statistics))
        )
        external = not self._is_fresh(norm.input)
        for node in between(norm.node, place):
            if node is norm.output or not effects.is_call(node):
                continue
            writes = written(node)
            require(writes is not None, f"{name_of(node)} stands between it and the sum")
            assert writes is not None
            if norm.operator is ops.batch_norm_sync:
                require(not _is_collective(node), "a collective stands between it and the sum")
            require(not any(memory(n) & updated for n in node.all_input_nodes), "its statistics are used in between")
            require(not any(memory(n) & inputs for n in writes), "its inputs are written in between")
            # Two inputs of a graph may share memory, which the graph does not show.
            unknown = external and not patterns.is_batch_norm(node) and not all(map(self._is_fresh, writes))
            require(not unknown, "an input of the graph is written in between")

    def _check_residual(self, added: Sum, applied: Applied, place: fx.Node, activation: fx.Node) -> None:
        """Backward of a smooth activation reads the residual, which torch's sum does not save."""
        if applied.activation.name in _C.rectifiers or not effects.value(activation).requires_grad:
            return
        kept, residual = memory(added.residual), effects.tensor(added.residual)
        external = residual is not None and not self._is_fresh(added.residual)
        if not (self.for_compiler or self.within):  # a compiler may save the residual, too
            returned = any(memory(node) & kept for node in self.graph.output_node().all_input_nodes)
            require(not (external or returned), "the residual, which its backward reads, can be written to until then")
        for node in between(place, self.graph.output_node()):
            writes = written(node) if node is not activation else []
            suspects = node.all_input_nodes if writes is None else writes
            require(not any(memory(n) & kept for n in suspects), "the residual is written to later")
            if external and not patterns.is_batch_norm(node):
                like = [t for n in writes or () if not self._is_fresh(n) and (t := effects.tensor(n)) is not None]
                require(
                    not any(t.dtype == residual.dtype for t in like),  # type: ignore[union-attr]
                    "an input of the graph, which may be the residual, is written to later",
                )

    def _first_reader(self, names: set[fx.Node], what: str) -> fx.Node:
        readers = self._readers(names)
        require(readers, f"its {what} is not used")
        require(readers[0].op != "output", f"its {what} is returned")
        return readers[0]

    def _readers(self, names: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes that read the value, in order; without those that ask for its shape, which the input can answer."""
        users = {user for name in names for user in name.users}.difference(names)
        return sorted(user for user in users if not _asks_for_shape(user))

    def _aliases(self, node: fx.Node) -> list[fx.Node]:
        lies_in = memory(node)
        return [other for other in self.graph.nodes if memory(other) & lies_in]

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether only this graph holds the memory of a value."""
        return bool(memory(node)) and all(n.op not in ("placeholder", "get_attr") for n in self._aliases(node))

    def _rewrite(
        self,
        norm: BatchNorm,
        added: Sum | None,
        applied: Applied,
        last: fx.Node,
        activation: fx.Node,
        names: set[fx.Node],
    ) -> None:
        for name in {norm.output, *names}:
            for user in [user for user in name.users if _asks_for_shape(user)]:
                user.replace_input_with(name, norm.input)
        residual = added.residual if added else None
        self._put(norm, last if added else norm.node, (residual, *applied.activation), {activation, last, *names})

    def _replace(self, norm: BatchNorm) -> None:
        """Replace torch's function by bnext's operator."""
        self._put(norm, norm.node, (), {norm.output})

    def _put(self, norm: BatchNorm, place: fx.Node, epilogue: tuple[object, ...], replaced: set[fx.Node]) -> None:
        final = max(replaced)
        with self.graph.inserting_before(place):
            call, output = norm.call(self.graph, *epilogue)
        for node, like in ((call, norm.node), (output, final)):
            node.meta = dict(like.meta)
            self.mode[node] = self.mode[norm.node]
        for node in replaced:
            node.replace_all_uses_with(output)
        for node in sorted({*replaced, norm.output, norm.node}, reverse=True):
            self.graph.erase_node(node)


def _asks_for_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1:] in (("shape",), ("ndim",))


def _is_collective(node: fx.Node) -> bool:
    if node.target is ops.batch_norm_sync:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and "c10d" in node.target.namespace


def _place_of(node: fx.Node) -> tuple[int | None, tuple[str, ...], str]:
    """The first fields of an :class:`Outcome`."""
    # Dynamo's key for a layer is its id, perhaps with the number of its call.
    key, (path, _) = list((node.meta.get("nn_module_stack") or {"": ("", None)}).items())[-1]
    identity = key.partition("@")[0]
    vectors = tuple(n.name for n in node.all_input_nodes if n.op == "placeholder")
    return int(identity) if identity.isdecimal() else None, vectors, path or name_of(node)
