"""Eager fusing of a model: its call is captured by ``torch._dynamo``, fused, and run as it is.

It is installed as an object in the model's ``_compiled_call_impl``, which ``nn.Module.__call__`` looks up first: class,
names and state_dict stay untouched, and dynamo's guards notice later changes of the model.
"""

from __future__ import annotations

import itertools
import logging
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext import functional, known, memory, native
from bnext.attached import Attached, attach
from bnext.fusion import backend
from bnext.fusion.report import ITSELF, Report

_logger = logging.getLogger("bnext")

_CALL = "_compiled_call_impl"
_KEPT = "_bnext_fusing"  # a second key for the object: __getstate__ drops _compiled_call_impl

# Dynamo's settings during fused calls. What cannot be captured runs uncaptured; hooks that are added later are seen;
# graphs are not split at the buckets of DistributedDataParallel, which matter to compilers only; integers of a module
# that change do not recompile; and a model in training, evaluation and inference, with several sizes, has more than the
# default of eight graphs.
_SETTINGS: dict[str, Any] = {
    "suppress_errors": True,
    "recompile_limit": 32,
    "skip_nnmodule_hook_guards": False,
    "optimize_ddp": False,
    "allow_unspec_int_on_nn_module": True,
    "trace_numpy": False,
}


class _Settings:
    """Puts dynamo's settings in place for a call. Where they are global to the process, as before torch 2.13, the first
    of several concurrent calls sets them, and the last restores them."""

    def __init__(self) -> None:
        config: Any = torch._dynamo.config
        self._change = config._make_closure_patcher(**_SETTINGS)
        self._per_thread = isinstance(config._config["suppress_errors"].user_override, ContextVar)
        self._lock = threading.Lock()
        self._calls = 0

    def __call__(self) -> Callable[[], None]:
        if self._per_thread:
            revert: Callable[[], None] = self._change()
            return revert
        with self._lock:
            if self._calls == 0:
                self._revert = self._change()
            self._calls += 1
        return self._leave

    def _leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                self._revert()


_settings = _Settings()
torch.compiler.assume_constant_result(functional.keeps_operators)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


_numbers = itertools.count()
_RESTARTS = 3  # some feature extractors end every forward with an exception: capturing each anew would be slow


class _Captured:
    """The graphs of a model and its copies, and what was fused in them."""

    def __init__(self, verbose: bool, recompute: bool) -> None:
        self.report = Report()
        self.verbose = verbose
        self.recompute = recompute
        self.restarts = 0
        self.start_again()

    def start_again(self) -> None:
        """Forget all graphs."""
        # Dynamo keeps and counts graphs by code object, and notes which inputs change by the code's name. So each model
        # has a code object and a name of its own.
        code = _call.__code__.replace(co_name=f"call_{next(_numbers)}")
        function = types.FunctionType(code, _call.__globals__, code.co_name)
        optimize: Any = torch._dynamo.optimize(backend=backend.eager)
        optimize.enter_exit_hooks.append(_settings)
        self.run: Callable[..., Any] = optimize(function)


class Fusing(Attached):
    """Calls its owner through dynamo, or directly where something else traces, transforms or observes the call."""

    def __init__(self, owner: nn.Module, captured: _Captured) -> None:
        super().__init__(owner)
        self.captured = captured
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._owner()
        assert module is not None
        with memory.recompute() if self.captured.recompute else nullcontext():
            return module._call_impl(*args, **kwargs) if _stands_aside() else self._fused(module, args, kwargs)

    def _fused(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running, report = backend.running, self.captured.report
        before = running.model, running.report, functional.capture.eager
        graphs, errors = len(report.graphs), len(report.errors)
        running.model, running.report, functional.capture.eager = module, report, True
        try:
            output = self.captured.run(module, args, kwargs)
        except Exception:
            # Dynamo does not retry a frame that raised while it was captured, but here the call itself may have raised.
            if self.captured.restarts < _RESTARTS:
                del report.errors[errors:]
                self.captured.restarts += 1
                self.captured.start_again()
            raise
        finally:
            running.model, running.report, functional.capture.eager = before
        if len(report.graphs) != graphs:
            _logger.info("%s", report)
            if self.captured.verbose:
                print(report)
        if (report.errors or not report.graphs) and not self._warned:
            self._warned = True
            why = report.errors[0] if report.errors else "nothing in it that dynamo compiles"
            some = "part of the" if report.graphs else "the"
            _logger.warning(
                "%s calls of %s could not be captured and run unfused: %s", some, type(module).__name__, why
            )
        return output

    def follow(self, copy: nn.Module) -> Attached:
        return attach(copy, Fusing(copy, self.captured), _CALL, _KEPT)

    def remake(self) -> tuple[Any, ...]:
        return _attach, (self._owner(), self.captured.verbose, self.captured.recompute)


def _attach(owner: nn.Module, verbose: bool, recompute: bool = False) -> Attached:
    return attach(owner, Fusing(owner, _Captured(verbose, recompute)), _CALL, _KEPT)


def install(module: nn.Module, verbose: bool = False, recompute: bool = False) -> None:
    """Let calls of a module be fused, and their outputs recomputed if that is asked for. A module that the user has
    compiled is left as it is."""
    installed = module.__dict__.get(_KEPT)
    if isinstance(installed, Fusing) and installed.acts_for(module):
        installed.captured.verbose = verbose
        installed.captured.recompute = recompute
        return
    if module.__dict__.get(_CALL) is not None:
        _logger.warning("%s is compiled already, which stays; nothing is fused", type(module).__name__)
        return
    compiled = [name for name, m in module.named_modules() if _is_compiled(m)]
    if compiled:
        _logger.warning("compiled parts are captured with the whole model, and not compiled: %s", ", ".join(compiled))
    _attach(module, verbose, recompute)


def _is_compiled(module: nn.Module) -> bool:
    own = module.__dict__.get(_CALL)
    return isinstance(module, torch._dynamo.OptimizedModule) or not (own is None or isinstance(own, Fusing))


def report_of(model: nn.Module) -> Report:
    """What was fused in a model, and in parts of it that were converted by themselves.

    Raises:
        ValueError: nothing was converted.
    """
    found = {name: m.__dict__.get(_KEPT) for name, m in model.named_modules()}
    reports = {f"{name}." if name else "": f.captured.report for name, f in found.items() if isinstance(f, Fusing)}
    if not reports:
        raise ValueError("expected a module that was converted with fuse=True, but nothing in it was")
    total = Report()
    for prefix, report in reports.items():
        total.merge(report, prefix)
    seen = {name for name, _ in (*total.fused, *total.left)}
    unseen = "no graph has it: it has not been called, or dynamo could not capture its call"
    for name, m in model.named_modules():
        if (isinstance(m, _BatchNorm) or known.is_adopted(m)) and (name or ITSELF) not in seen:
            total.left.append((name or ITSELF, unseen))
    return total


def _stands_aside() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.nn.modules.module._has_any_global_hook()
        or torch._dynamo.eval_frame._stance.stance == "force_eager"
        or (torch._C._len_torch_function_stack() > 0 and native.has_foreign_function_mode())
    )
