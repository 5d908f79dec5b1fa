"""Batch norms of torch and of other libraries: the classes whose forward convert knows.

Such a layer keeps its class, because quantisers, folding passes, counters and validators look layers up by their exact
class; only its forward is replaced. Classes of other libraries are recognised by name and structure, so that no library
needs to be imported.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnext import functional, modules
from bnext.attached import attach_forward, has_forward

_TORCH = {
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
}

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def adopt(layer: nn.Module) -> bool:
    """Give a layer of a known class bnext's forward. Returns whether the layer has it now."""
    if layer.__dict__.get("forward") is not None:
        return has_forward(layer)
    if type(layer) in _TORCH:
        attach_forward(layer, _normalize)
        return True
    function = _normalize_act if _is_timm_act(layer) else _frozen if _is_frozen(layer) else None
    if function is not None:
        attach_forward(layer, function)
    return function is not None


def is_adopted(layer: nn.Module) -> bool:
    return has_forward(layer)


def _library(layer: nn.Module) -> str:
    return type(layer).__module__.partition(".")[0]


def _is_timm_act(layer: nn.Module) -> bool:
    return type(layer).__name__ == "BatchNormAct2d" and _library(layer) == "timm" and isinstance(layer, nn.BatchNorm2d)


def _is_frozen(layer: nn.Module) -> bool:
    """Whether it computes (x - running_mean)/sqrt(running_var + eps)*weight + bias from buffers, and perhaps timm's
    drop layer and activation after it. Many projects have a copy of this class, so its forward is tried on numbers."""
    act = type(layer).__name__ == "FrozenBatchNormAct2d" and _library(layer) == "timm"
    if not (act or type(layer).__name__ == "FrozenBatchNorm2d") or not isinstance(getattr(layer, "eps", None), float):
        return False
    buffers = [layer._buffers.get(name) for name in _STATISTICS]
    if any(b is None or b.dim() != 1 for b in buffers):
        return False
    if act:
        return True
    weight = buffers[0]
    assert weight is not None
    if weight.device.type == "meta":
        return False
    probe = torch.randn((2, len(weight), 1, 2), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            theirs, ours = type(layer).forward(layer, probe), _frozen(layer, probe)
        return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2)
    except Exception:  # another library's forward may raise anything
        return False


def _normalize(
    self: modules.BatchNorm, input: Tensor, *, lengths: modules.Lengths = None, mask: Tensor | None = None
) -> Tensor:
    """torch.nn.BatchNorm1d, 2d and 3d"""
    if modules.is_traced(input):
        traced: Tensor = type(self).forward(self, input)
        return traced
    return modules.normalize(self, input, lengths=lengths, mask=mask)


def _normalize_act(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """timm.layers.BatchNormAct2d"""
    if modules.is_traced(x):
        return type(self).forward(self, x)
    output: Tensor = self.act(self.drop(modules.normalize(self, x)))  # type: ignore[operator]
    return output


def _frozen(self: nn.Module, x: Tensor) -> Tensor:
    """FrozenBatchNorm2d of torchvision and detectron2, FrozenBatchNormAct2d of timm"""
    weight, bias, mean, var = (self._buffers[name] for name in _STATISTICS)
    if modules.is_traced(x) or x.dim() != 4 or weight is None or x.dtype != weight.dtype:
        output: Tensor = type(self).forward(self, x)  # mixed dtypes are promoted there
        return output
    output = functional.eval_batch_norm(x, mean, var, weight, bias, self.eps)  # type: ignore[arg-type]
    for name in ("drop", "act"):
        if name in self._modules:
            output = getattr(self, name)(output)
    return output
