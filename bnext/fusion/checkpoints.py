"""Activation checkpointing inside a graph that runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from bnext.fusion.effects import memory, written

_TAG = torch.ops.higher_order.tag_activation_checkpoint


def run_checkpoints(module: fx.GraphModule) -> None:
    """Replace dynamo's checkpoint, which is for compilers that preserve random states themselves, by torch's own.

    If it ran as it is, dropout would get other random numbers when a region is recomputed.
    """
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        tagged = [node for node in part.graph.nodes if node.target is _TAG]
        for node in tagged:
            body = getattr(part, node.args[0].target)
            node.target = partial(_checkpoint, _written_inputs(body))
            node.target.__name__ = "checkpoint"  # the generated code calls it by this name
        if tagged:
            part.recompile()


def _written_inputs(body: fx.GraphModule) -> frozenset[int]:
    """The positions of the inputs that a region writes to: running statistics and counters."""
    touched: frozenset[int] = frozenset()
    for node in body.graph.nodes:
        writes = written(node) or []
        if node.target is _TAG:
            writes = [node.args[1 + i] for i in _written_inputs(getattr(body, node.args[0].target))]
        touched = touched.union(*map(memory, writes))
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    return frozenset(i for i, node in enumerate(inputs) if memory(node) & touched)


def _checkpoint(held: frozenset[int], body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """torch's checkpoint of a region. Inputs that the region writes to are not passed as its arguments: checkpoint
    would raise when it finds them changed at recomputation."""

    def call(*others: Any) -> Any:
        given = iter(others)
        return body(*(args[i] if i in held else next(given) for i in range(len(args))))

    kwargs["use_reentrant"] = False
    context: Callable[[], Any] | None = body.meta.get("_checkpoint_context_fn")
    if context is not None:
        kwargs["context_fn"] = context
    return checkpoint(call, *(a for i, a in enumerate(args) if i not in held), **kwargs)
