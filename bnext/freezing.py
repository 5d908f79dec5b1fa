"""Frozen batch norms: they stay in evaluation, whatever mode the model around them is put into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.attached import attach_method, attached_function, detach_methods

_Module = TypeVar("_Module", bound=torch.nn.Module)

_TRAIN, _REPR = "train", "extra_repr"  # the methods that are replaced in a frozen layer


@dataclass(frozen=True)
class _Frozen:
    """A frozen layer's ``train``, and what the layer gets back when it is unfrozen."""

    training: bool  # the mode that was last asked for
    parameters: tuple[str, ...] = ()  # those that required gradients

    def __call__(self, layer: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
        type(layer).train(layer, mode)  # checks the mode, and sets it on the layer's submodules
        self.attach(layer, layer.training)
        return layer

    def attach(self, layer: torch.nn.Module, training: bool) -> None:
        attach_method(layer, _TRAIN, replace(self, training=training), lasting=True)
        layer.training = False


def _extra_repr(layer: torch.nn.Module) -> str:
    return f"{type(layer).extra_repr(layer)}, frozen"


def freeze(model: _Module, affine: bool = True) -> _Module:
    r"""Put every batch norm of a model into evaluation for good, in place: ``model.train()`` does not undo it.

    A frozen layer normalises by its running statistics,

    .. math::
        y = \gamma\,\frac{x - \mu_\text{running}}{\sqrt{\sigma^2_\text{running} + \epsilon}} + \beta

    which no longer change, nor does ``num_batches_tracked``. Call it before fine-tuning on small batches, as of
    detectors, once the weights are loaded, and before the model is wrapped in ``DistributedDataParallel`` or its
    parameters are given to an optimiser.

    It freezes all instances of torch's batch norms: torch's own classes, bnext's, activated and synchronised ones, and
    subclasses of other libraries, converted by :func:`bnext.convert` before or after, or not. Class, parameters,
    buffers, hooks and state_dict stay as they are; ``repr`` says ``frozen``. Copies by ``copy.deepcopy``, pickles and
    replicas are frozen too, and :func:`bnext.revert` leaves frozen layers frozen. A lazy layer that is not initialised
    yet evaluates from its first call on. Submodules of a layer, as the drop layer of timm's, follow the model's mode.

    With ``affine=True`` bnext's forward saves no input: from forward to backward a layer holds vectors of C values, and
    one bit an element where a ReLU is fused.

    Only ``train`` and ``eval`` are kept from changing the mode, not an assignment to ``layer.training``; layers made
    anew (by ``torch.jit.script`` or ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``) are not frozen. A second call
    changes nothing, except that ``affine=True`` freezes parameters that were left out before.

    Args:
        model: a model, or a single layer.
        affine: whether weight and bias are frozen, too, by ``requires_grad=False``; else they remain trainable.

    Returns:
        The same module.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or ``affine`` not a bool.
        ValueError: a batch norm has no running statistics (``track_running_stats=False``), or a ``train`` or
            ``extra_repr`` in its ``__dict__``. The message names these layers, and nothing was frozen.
    """
    layers = _batch_norms(model)
    if not isinstance(affine, bool):
        raise TypeError(f"expected affine to be a bool, but got {type(affine).__name__}")
    _refuse(layers, _lacks_statistics, "running statistics in every batch norm, but these have none")
    _refuse(layers, _has_methods, "no train or extra_repr in the __dict__ of a batch norm, but these have one")
    for layer in layers.values():
        frozen = _of(layer) or _Frozen(layer.training)
        found = {name: layer._parameters.get(name) for name in ("weight", "bias")} if affine else {}
        trained = {name: p for name, p in found.items() if p is not None and p.requires_grad}
        for parameter in trained.values():
            parameter.requires_grad = False  # requires_grad_ raises on an uninitialised parameter
        replace(frozen, parameters=(*frozen.parameters, *trained)).attach(layer, frozen.training)
        attach_method(layer, _REPR, _extra_repr, lasting=True)
    return model


def unfreeze(model: _Module) -> _Module:
    """Undo :func:`freeze`, in place: a layer is in the mode that its model was last put into, and weight and bias
    require gradients if they did.

    Layers that are not frozen are not touched.

    Args:
        model: a model, or a single layer.

    Returns:
        The same module.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    for layer in _batch_norms(model).values():
        frozen = _of(layer)
        if frozen is None:
            continue
        detach_methods(layer, _TRAIN, _REPR)
        layer.training = frozen.training
        for name in frozen.parameters:
            parameter = layer._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad = True
    return model


def mode_of(module: torch.nn.Module) -> bool:
    """The mode that ``train`` or ``eval`` last asked for; of a module that is not frozen, the mode that it is in."""
    frozen = _of(module)
    return module.training if frozen is None else frozen.training


def set_mode(module: torch.nn.Module, training: bool) -> None:
    """Ask for a mode as ``train`` does, but of the module alone, without its submodules."""
    frozen = _of(module)
    if frozen is None:
        module.training = training
    else:
        frozen.attach(module, training)


def _of(module: torch.nn.Module) -> _Frozen | None:
    function = attached_function(module, _TRAIN)
    return function if isinstance(function, _Frozen) else None


def _batch_norms(model: Any) -> dict[str, torch.nn.Module]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _refuse(layers: dict[str, torch.nn.Module], found: Callable[[Any], bool], otherwise: str) -> None:
    names = [name or "(the module itself)" for name, layer in layers.items() if found(layer)]
    if names:
        raise ValueError(f"expected {otherwise}: {', '.join(names)}")


def _lacks_statistics(layer: _BatchNorm) -> bool:
    return layer.running_mean is None or layer.running_var is None


def _has_methods(layer: torch.nn.Module) -> bool:
    return any(name in layer.__dict__ and attached_function(layer, name) is None for name in (_TRAIN, _REPR))
