"""Whole models at once: torch's batch-norm layers to bnext's, and back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bnext import batches, known, modules
from bnext import sync as synchronization
from bnext.attached import detach
from bnext.modules import Activated
from bnext.sync import SyncBatchNorm

if TYPE_CHECKING:
    from bnext.fusion.report import Report

_logger = logging.getLogger("bnext")

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Classes = dict[type[torch.nn.Module], type[torch.nn.Module]]

_TO_TORCH: _Classes = {
    modules.BatchNorm1d: torch.nn.BatchNorm1d,
    modules.BatchNorm2d: torch.nn.BatchNorm2d,
    modules.BatchNorm3d: torch.nn.BatchNorm3d,
    modules.LazyBatchNorm1d: torch.nn.LazyBatchNorm1d,
    modules.LazyBatchNorm2d: torch.nn.LazyBatchNorm2d,
    modules.LazyBatchNorm3d: torch.nn.LazyBatchNorm3d,
    SyncBatchNorm: torch.nn.SyncBatchNorm,
}
_OURS = {*_TO_TORCH, modules.BatchNormAct1d, modules.BatchNormAct2d, modules.BatchNormAct3d}


def convert(
    module: _Module,
    *,
    fuse: bool = False,
    recompute: bool = False,
    sync: bool = False,
    process_group: Any = None,
    single_value: str | None = None,
    update_in_backward: bool = True,
    virtual_batch_size: int | None = None,
    verbose: bool = False,
) -> _Module:
    """Turn every batch-norm layer of a model into bnext's, in place.

    A layer is given another ``forward`` and nothing else: its class, parameters, buffers, hooks, the ``training`` flag,
    attributes and names stay the same objects, shared layers stay shared, and optimisers keep what they hold. So a
    state_dict saved before loads afterwards, and the reverse, and tools that look for batch norms (quantisers, folding,
    counters of operations, privacy validators) find them.

    It changes layers whose type is exactly ``torch.nn.BatchNorm1d/2d/3d`` or ``torch.nn.LazyBatchNorm1d/2d/3d``, and
    layers of other libraries whose forward it knows: timm's ``BatchNormAct2d``, with its drop layer and activation, and
    the frozen batch norms of torchvision, timm and detectron2. ``torch.nn.SyncBatchNorm`` becomes
    :class:`bnext.SyncBatchNorm`. Other batch norms (a subclass may have a forward of its own) are left alone, and
    listed in one warning of the logger ``"bnext"``.

    In graphs that other tools read (``torch.export``, ``torch.onnx``, ``torch.jit``, ``torch.fx``), for tensor
    subclasses, under modes that intercept torch's functions, and on devices for which bnext has no kernels, a layer
    runs torch's own batch norm. Copy a layer by ``copy.deepcopy``: a shallow ``copy.copy`` computes what the original
    layer does, in the original's mode.

    With ``fuse=True`` calls of the model are captured by ``torch._dynamo``, as by ``torch.compile``, and in the
    captured graph a batch norm is fused with the activation that follows it, and with a residual's sum between them;
    the graph is then run as it is, operator by operator. No compiler is needed, and the first call of a new shape or
    mode takes about as long as with ``torch.compile(backend="eager")``.

    - It fuses ReLU, ReLU6, LeakyReLU, SiLU, GELU (exact), Hardswish, Mish and ELU, as modules, functions and methods.
    - Later changes of the model (layers replaced, wrapped, hooked, frozen, folded) take effect, as with
      ``torch.compile``; the class, names and state_dict of every module are untouched, and copies and pickles fuse too.
    - A part of the model that is called by itself is not fused; nor are calls under ``torch.export``, tracers,
      ``torch.func`` transforms or torch's modes, which see the layers as they are.
    - A model that dynamo cannot capture runs unfused, with one warning of the logger ``"bnext"``.
    - :func:`bnext.fusion_report` says, after a call, what was fused and why the rest was not.

    With ``fuse=True, recompute=True`` the outputs of batch norms that other operators save for backward are not kept:
    backward recomputes them, with the same bits. An EfficientNet takes half the memory, for a few percent of the time
    of a step. Every call of the model is then a call within :func:`bnext.recompute`, whose documentation says what is
    recomputed and what is not.

    With ``sync=True`` every layer, fused ones too, becomes a :class:`bnext.SyncBatchNorm`: in training, statistics are
    those of the batches of all processes of a group. Call it before the model is wrapped in
    ``DistributedDataParallel``, which accepts it on the CPU, too. Lazy layers stay as they are, and are listed.

    A result never changes by more than rounding, unless one of three policies is asked for, which set the attributes of
    the same names on every layer:

    - ``single_value="running"``: a training batch of one value a channel, for which torch raises an error, is
      normalised by the running statistics, which it leaves unchanged.
    - ``update_in_backward=False``: a forward that runs within a backward pass, as activation checkpointing runs it a
      second time, leaves running statistics and counters alone, so that a batch counts once. A forward that runs
      anywhere else counts as usual.
    - ``virtual_batch_size``: in training, so many consecutive images at a time are normalised by their own statistics
      (ghost batch normalisation, :func:`bnext.functional.batch_norm`).

    Args:
        module: a model, or a single layer.
        fuse: whether to fuse.
        recompute: whether outputs are recomputed in backward; needs ``fuse``.
        sync: whether to synchronise. Layers that are synchronised already stay so without it.
        process_group: of ``sync``; None: all processes.
        single_value: ``"running"``, or None, as torch.
        update_in_backward: False, or True, as torch.
        virtual_batch_size: images of a part, or None, as torch: all of a batch.
        verbose: whether to print what was done and, with ``fuse``, after each call that captured a graph, what was
            fused, and what was left and why. Otherwise that is logged by ``"bnext"`` at level INFO.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``, ``fuse``, ``recompute``, ``sync`` or ``verbose`` not a
            bool, or ``virtual_batch_size`` not an int.
        ValueError: ``recompute`` without ``fuse``; another ``single_value``; ``virtual_batch_size`` below 1, or with
            synchronised layers.
    """
    flags = {"fuse": fuse, "recompute": recompute, "sync": sync, "verbose": verbose}
    for name, flag in {**flags, "update_in_backward": update_in_backward}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"expected {name} to be a bool, but got {type(flag).__name__}")
    if recompute and not fuse:
        raise ValueError("expected fuse=True with recompute=True, which is for whole calls of a model, but got False")
    modules.check_single_value(single_value)
    batches.part_size(virtual_batch_size)
    _check(module)
    # Listed before anything is changed: a module may override the traversal in a way that raises.
    layers = list(module.named_modules())
    if virtual_batch_size is not None and (sync or any(isinstance(m, torch.nn.SyncBatchNorm) for _, m in layers)):
        raise ValueError(
            "expected no virtual_batch_size with synchronised layers, whose processes share a batch, but got "
            f"{virtual_batch_size}"
        )
    if fuse:
        from bnext.fusion import eager  # imports torch._dynamo, which takes a second
    for _, m in layers:
        if type(m) is torch.nn.SyncBatchNorm:
            m.__class__ = SyncBatchNorm
    ours = [m for _, m in layers if type(m) in _OURS or known.adopt(m)]
    left = [(name, m) for name, m in layers if _is_unknown(m)]
    if left:
        classes = sorted({f"{type(m).__module__}.{type(m).__qualname__}" for _, m in left})
        names = ", ".join(name or "(the module itself)" for name, _ in left)
        _logger.warning(
            "convert left alone %d batch norm(s) of other classes (%s): %s", len(left), ", ".join(classes), names
        )
    options = {
        modules.SINGLE_VALUE: single_value,
        modules.VIRTUAL_BATCH_SIZE: virtual_batch_size,
        modules.UPDATE_IN_BACKWARD: None if update_in_backward else False,
    }
    asked_for = {name: value for name, value in options.items() if value is not None}
    for m in ours:
        m.__dict__.update(asked_for)
    lines = [f"{len(ours)} batch norm(s) are bnext's"]
    if sync:
        synchronization.synchronize(module, process_group)
        lazy = [name for name, m in layers if isinstance(m, _BatchNorm) and isinstance(m, LazyModuleMixin)]
        if lazy:
            _logger.warning(
                "convert left %d batch norm(s) without sync until they are initialised: %s", len(lazy), ", ".join(lazy)
            )
        lines.append(f"{sum(type(m) is SyncBatchNorm for _, m in layers)} batch norm(s) are synchronised")
    if fuse:
        eager.install(module, verbose, recompute)
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
    left = []
    for name, m in module.named_modules():
        detach(m)
        for option in (modules.SINGLE_VALUE, modules.UPDATE_IN_BACKWARD, modules.VIRTUAL_BATCH_SIZE):
            m.__dict__.pop(option, None)
        if isinstance(m, Activated) and m.act is not None:
            left.append(name or "(the module itself)")
        else:
            m.__class__ = _TO_TORCH.get(type(m), type(m))
    if left:
        _logger.warning(
            "revert left alone %d batch norm(s) with activations that have no counterpart: %s",
            len(left),
            ", ".join(left),
        )
    return module


def fusion_report(module: torch.nn.Module) -> Report:
    """What ``convert(fuse=True)`` has fused in the calls of a model so far, and what it has left and why.

    Args:
        module: a converted model, or a module that contains one.

    Returns:
        ``fused``, a list of (name, what), and ``left``, of (name, why not); as a string, a line for each. A batch norm
        that is fused in one graph and left in another is in both; one that no graph has seen is in ``left``.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: nothing in it was converted with ``fuse=True``.
    """
    _check(module)
    from bnext.fusion.eager import report_of

    return report_of(module)


def _check(module: object) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, but got {type(module).__name__}")


def _is_unknown(m: torch.nn.Module) -> bool:
    return isinstance(m, _BatchNorm) and type(m) not in _OURS and not known.is_adopted(m)
