"""Whole models at once: torch's batch-norm layers to bnext's, and back."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch

from bnext import modules

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
}
_TO_TORCH: _Classes = {ours: theirs for theirs, ours in _TO_BNEXT.items()}


def convert(module: _Module) -> _Module:
    """Turn every batch-norm layer of a model into bnext's, in place.

    A layer changes its class and nothing else: parameters, buffers, hooks, the ``training`` flag, attributes and
    names stay the same objects, shared layers stay shared, and optimisers keep what they hold. So a state_dict
    saved before loads after, and the reverse.

    Only layers whose type is exactly ``torch.nn.BatchNorm1d/2d/3d`` or ``torch.nn.LazyBatchNorm1d/2d/3d`` are
    changed. Other batch norms (a subclass may have a forward of its own) are left alone, and listed in one warning
    of the logger ``"bnext"``.

    Args:
        module: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    _swap(module, _TO_BNEXT)
    left = [
        f"{name or '(the module itself)'} ({type(m).__module__}.{type(m).__qualname__})"
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and type(m) not in _TO_TORCH
    ]
    if left:
        _logger.warning("convert left alone %d batch norm(s) of other classes: %s", len(left), ", ".join(left))
    return module


def revert(module: _Module) -> _Module:
    """Undo :func:`convert`: turn bnext's layers into torch's, in place.

    Args:
        module: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
    """
    _swap(module, _TO_TORCH)
    return module


def _swap(module: torch.nn.Module, classes: _Classes) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"expected module to be a torch.nn.Module, but got {type(module).__name__}")
    for m in module.modules():
        replacement = classes.get(type(m))
        if replacement is not None:
            m.__class__ = replacement
