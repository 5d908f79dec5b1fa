"""Back ends of ``torch.compile``: the pass, and then inductor, or nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from bnext.fusion.checkpoints import run_checkpoints
from bnext.fusion.report import Report
from bnext.fusion.rewrite import fuse

_logger = logging.getLogger("bnext")


def inductor(
    module: fx.GraphModule, inputs: list[Tensor], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """``torch.compile(model, backend="bnext")``: fuse, then compile as inductor does, with its modes and options.

    An entry point of the group ``torch_dynamo_backends``, so that bnext need not be imported. What was fused is logged
    by the logger ``"bnext"`` at level INFO.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    report = Report()
    report.add(fuse(module, for_compiler=True), {})
    _logger.info("%s", report)
    return compile_fx(module, inputs, config_patches={**list_mode_options(mode), **(options or {})})


class Running(threading.local):
    """The model whose call of this thread captures a graph: its report, and its names by the id of a module."""

    report: Report | None = None
    names: Callable[[], dict[int, str]] = dict


running = Running()


class _Suppressed(logging.Filter):
    """Takes what dynamo says, a stack trace each time, of frames that it fails on and leaves as they are; the model says
    it once."""

    def filter(self, record: logging.LogRecord) -> bool:
        if running.report is None or not record.exc_info or record.exc_info[1] is None:
            return True
        error = record.exc_info[1]
        running.report.errors.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return False


logging.getLogger("torch._dynamo.convert_frame").addFilter(_Suppressed())


def eager(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Fuse, and run the graph operator by operator, autograd as ever."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, input in zip(placeholders, inputs, strict=True):
        if isinstance(input, Tensor) and input.layout != node.meta["example_value"].layout:
            raise RuntimeError(
                f"dynamo took an input of layout {input.layout} for a dense one"
            )  # then it runs uncaptured
    outcomes = fuse(module)
    if running.report is not None:
        running.report.add(outcomes, running.names())
    run_checkpoints(module)
    return module.forward
