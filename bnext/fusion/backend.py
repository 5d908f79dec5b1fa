"""Back ends of ``torch.compile``: the pass, followed by inductor or by eager execution."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from bnext import ops
from bnext.fusion.checkpoints import run_checkpoints
from bnext.fusion.report import ITSELF, Report
from bnext.fusion.rewrite import Outcome, fuse

_logger = logging.getLogger("bnext")


def inductor(
    module: fx.GraphModule, inputs: list[Tensor], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """``torch.compile(model, backend="bnext")``: fuse, then compile as inductor does, with its modes and options.

    It is an entry point of the group ``torch_dynamo_backends``, so that users need not import bnext. What was fused is
    logged by the logger ``"bnext"`` at level INFO.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _accept_any_layout()
    report = Report()
    report.add(id(module), fuse(module, for_compiler=True), lambda outcome: outcome.call)
    _logger.info("%s", report)
    patches = list_mode_options(mode) if mode else {}
    return compile_fx(module, inputs, config_patches={**patches, **(options or {})})


@functools.cache
def _accept_any_layout() -> None:
    """Let inductor give the operators whatever memory format it has chosen for the convolutions around them.

    By default it copies the arguments of an operator that it does not know into the format that was traced. A mask's
    shape depends on the format; so with a mask the format stays as traced.
    """
    from torch._inductor.lowering import constrain_to_fx_strides, make_fallback

    def constraint(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        given = ops.bind(node.target, node.args, node.kwargs)
        if given.get("with_mask") or given.get("mask") is not None:
            return constrain_to_fx_strides(node, *args, **kwargs)
        return args, kwargs

    for op in (ops.batch_norm_train, ops.batch_norm_eval, ops.batch_norm_backward):
        make_fallback(op, layout_constraint=constraint, warn=False)


class Running(threading.local):
    """The model that is being called in this thread, and the report of what is captured of it."""

    model: nn.Module | None = None
    report: Report | None = None


running = Running()


class _Suppressed(logging.Filter):
    """Drops dynamo's warnings of frames that it cannot capture, each with a stack trace, and records the errors in the
    report: a model warns once, in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        if running.report is None or not record.exc_info or record.exc_info[1] is None:
            return True
        error = getattr(record.exc_info[1], "inner_exception", record.exc_info[1])  # of a back end
        running.report.errors.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return False


logging.getLogger("torch._dynamo.convert_frame").addFilter(_Suppressed())


def eager(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Fuse, and run the graph operator by operator, with eager autograd."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, input in zip(placeholders, inputs, strict=True):
        if isinstance(input, Tensor) and input.layout != node.meta["example_value"].layout:
            # Dynamo runs a frame uncaptured if its back end raises.
            raise RuntimeError(f"dynamo took an input of layout {input.layout} for a dense one")
    outcomes = fuse(module)
    run_checkpoints(module)
    forward = module.forward

    def run(*args: Any) -> Any:
        # After a graph break, models of one class share the graphs of what follows.
        model, report = running.model, running.report
        if model is not None and report is not None and id(forward) not in report.graphs:
            vectors = {node.name: id(arg) for node, arg in zip(placeholders, args, strict=True)}
            report.add(id(forward), outcomes, _namer(model, vectors))
        return forward(*args)

    return run


def _namer(model: nn.Module, inputs: dict[str, int]) -> Callable[[Outcome], str]:
    """A function that finds a batch norm's name: by its layer, or by the layer's parameters and buffers."""
    names: dict[int, str] = {}
    layers: dict[int, int] = {}
    for name, module in model.named_modules():
        names[id(module)] = name or ITSELF
        layers |= {
            id(t): id(module) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
        }

    def find(outcome: Outcome) -> str:
        candidates = (outcome.module, *(layers.get(inputs.get(vector, 0)) for vector in outcome.vectors))
        return next((names[layer] for layer in candidates if layer in names), outcome.call)

    return find
