"""Whole models at once: torch's batch-norm layers to bnext's, and back."""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Any, TypeVar

import torch

from bnext import fuse as fusion
from bnext import modules
from bnext import sync as synchronization
from bnext.sync import SyncBatchNorm

_logger = logging.getLogger("bnext")

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Classes = dict[type[torch.nn.Module], type[torch.nn.Module]]

_TO_BNEXT: _Classes = {
    torch.nn.BatchNorm1d: modules.BatchNorm1d,
    torch.nn.BatchNorm2d: modules.BatchNorm2d,
    torch.nn.BatchNorm3d: modules.BatchNorm3d,
    torch.nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    torch.nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    torch.nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
_TO_TORCH: _Classes = {ours: theirs for theirs, ours in _TO_BNEXT.items()}
_LAZY = {modules.LazyBatchNorm1d, modules.LazyBatchNorm2d, modules.LazyBatchNorm3d}
_OURS = {*_TO_TORCH, modules.BatchNormAct1d, modules.BatchNormAct2d, modules.BatchNormAct3d}


def convert(
    module: _Module, *, fuse: bool = False, sync: bool = False, process_group: Any = None, verbose: bool = False
) -> _Module:
    """Turn every batch-norm layer of a model into bnext's, in place.

    A layer changes its class and nothing else: parameters, buffers, hooks, the ``training`` flag, attributes and
    names stay the same objects, shared layers stay shared, and optimisers keep what they hold. So a state_dict
    saved before loads after, and the reverse.

    Only layers whose type is exactly ``torch.nn.BatchNorm1d/2d/3d``, ``torch.nn.LazyBatchNorm1d/2d/3d`` or
    ``torch.nn.SyncBatchNorm`` are changed. Other batch norms (a subclass may have a forward of its own) are left
    alone, and listed in one warning of the logger ``"bnext"``.

    With ``fuse=True`` a batch norm also takes over the activation behind it, and the sum with a residual between
    them, and becomes a :class:`bnext.BatchNormAct2d` (1d, 3d): ``act(batch_norm(input) + residual)`` in one pass.
    Known are ReLU, LeakyReLU, SiLU, GELU (exact) and Hardswish, as modules, functions and methods.

    - In an ``nn.Sequential`` the place of the activation is kept by an identity.
    - Any other module that calls batch norms has its forward traced with ``torch.fx`` and, where something is
      fused, gets a generated one by way of a subclass of its class. Calls of
      ``torch.nn.functional.batch_norm`` become bnext's there. ``isinstance``, names, state_dicts, copies, pickles
      and ``torch.compile`` keep working.
    - A forward whose trace would not be the whole truth is left as it is: one that depends on its inputs or on
      whether an argument is None, has defaults, changes state, draws random numbers, or uses ``with`` or ``try``.
      So is a layer that has hooks, or that is called in places which want different activations.

    With ``sync=True`` every layer, fused ones too, becomes a :class:`bnext.SyncBatchNorm`: in training, statistics are
    those of the batches of all processes of a group. To be called before the model is wrapped in
    ``DistributedDataParallel``, which it needs not be on the CPU either. Lazy layers stay as they are, and are listed.

    A result never changes by more than rounding. What does change: a fused layer, called or hooked by itself, gives
    the activated value; settings that a traced forward reads (``self.drop_rate``) count as they are now; layers may
    be replaced only after :func:`revert`.

    Args:
        module: a model, or a single layer.
        fuse: whether to fuse.
        sync: whether to synchronise. Layers that are synchronised already stay so without it.
        process_group: of ``sync``; None: all processes.
        verbose: whether to print what was done, and what was left and why. Otherwise that of ``fuse`` is
            logged by ``"bnext"`` at level INFO.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``, or ``fuse``, ``sync`` or ``verbose`` not a bool.
    """
    for name, flag in (("fuse", fuse), ("sync", sync), ("verbose", verbose)):
        if not isinstance(flag, bool):
            raise TypeError(f"expected {name} to be a bool, but got {type(flag).__name__}")
    _swap(module, _TO_BNEXT)
    left = [
        f"{name or '(the module itself)'} ({type(m).__module__}.{type(m).__qualname__})"
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and type(m) not in _OURS
    ]
    if left:
        _logger.warning("convert left alone %d batch norm(s) of other classes: %s", len(left), ", ".join(left))
    lines = [f"{sum(type(m) in _OURS for m in module.modules())} batch norm(s) are bnext's"]
    if fuse:
        separated = synchronization.separate(module)
        report = str(fusion.fuse(module))
        for layer, group in separated:
            synchronization.synchronize(layer, group)
        _logger.info("%s", report)
        lines.append(report)
    if sync:
        synchronization.synchronize(module, process_group)
        lazy = [name for name, m in module.named_modules() if type(m) in _LAZY]
        if lazy:
            _logger.warning(
                "convert left %d batch norm(s) without sync until they are initialised: %s", len(lazy), ", ".join(lazy)
            )
        lines.append(f"{sum(type(m) is SyncBatchNorm for m in module.modules())} batch norm(s) are synchronised")
    if verbose:
        print("\n".join(lines))
    return module


def revert(module: _Module) -> _Module:
    """Undo :func:`convert`, with all that it fused: turn bnext's layers into torch's, in place.

    Activated layers that convert did not make have no counterpart in torch; they are left alone, and listed in one
    warning of the logger ``"bnext"``.

    Args:
        module: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    _check(module)
    synchronization.separate(module)
    left = set(fusion.undo(module))
    if left:
        names = ", ".join(name or "(the module itself)" for name in sorted(left))
        _logger.warning(
            "revert left alone %d batch norm(s) with activations that have no counterpart: %s", len(left), names
        )
    _swap(module, _TO_TORCH, left)
    return module


def _check(module: object) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, but got {type(module).__name__}")


def _swap(module: torch.nn.Module, classes: _Classes, left: Container[str] = ()) -> None:
    _check(module)
    for name, m in module.named_modules():
        replacement = classes.get(type(m))
        if replacement is not None and name not in left:
            m.__class__ = replacement
