"""torch's own batch norm, and which calls it takes: those that other tools observe, and those without kernels of bnext.

Exporters, counters of operations and tensor subclasses know torch's operators, not bnext's.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from bnext import _C, activations
from bnext.activations import Activation, Epilogue

_logger = logging.getLogger("bnext")

# Before 2.13 torch.compiler.is_exporting() is true while dynamo traces anything.
_KNOWS_EXPORT = torch.__version__ >= "2.13"


def is_exporting() -> bool:
    return torch.compiler.is_exporting() if _KNOWS_EXPORT else not torch.compiler.is_dynamo_compiling()


def takes(input: object) -> bool:
    """Whether torch's own batch norm takes a call: in a graph that other tools read, on tensor subclasses of others,
    and where bnext has no kernels."""
    if torch.compiler.is_compiling():
        if is_exporting():
            return True
    elif (
        _tracing_state() is not None
        or (_function_modes() > 0 and has_foreign_function_mode())
        or (_functorch_level() is not None and _is_functionalized())
    ):
        return True
    if not isinstance(input, Tensor):
        return False
    kind = type(input)
    if kind is not Tensor and kind is not torch.nn.Parameter and _has_semantics_of_its_own(kind):
        return True
    if input.is_mkldnn:  # of torch.utils.mkldnn
        return True
    if not input.is_cpu and input.device.type not in _DEVICES:
        if not torch.compiler.is_compiling():
            _warn_of_device(input.device.type)
        return True
    return input.dim() < 2 and input.numel() == 0  # torch treats such an input as no data at all


# Asked at every call, so looked up once.
_tracing_state = torch._C._get_tracing_state
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.maybe_current_level

_DEVICES = ("cpu", "cuda", "meta") if _C.cuda else ("cpu", "meta")


def _has_semantics_of_its_own(kind: type[Tensor]) -> bool:
    """Whether a tensor subclass overrides torch's functions, or wraps tensors for which it interprets operators, as
    DTensor does: it knows only torch's. (Fake and functional tensors, with which torch traces, do neither.)"""
    watches = kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    return watches or hasattr(kind, "__tensor_flatten__")


def has_foreign_function_mode() -> bool:
    """Whether a mode other than that of ``torch.set_default_device`` intercepts torch's functions."""
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, torch.utils._device.DeviceContext) for mode in modes)


def _is_functionalized() -> bool:
    """Whether ``torch.func.functionalize`` is active, which knows only torch's operators."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Functionalize for level in levels)


@functools.cache
def _warn_of_device(device: str) -> None:
    remedy = " (this bnext was built without CUDA: install it where torch has CUDA and nvcc is found)"
    _logger.warning(
        "bnext has no kernels for device %s, where torch's own batch norm runs%s",
        device,
        remedy if device == "cuda" else "",
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    epilogue: Epilogue,
    valid: Tensor | None = None,
    virtual_batch_size: int = 0,
) -> Tensor:
    """Batch norm with an epilogue, composed of torch's functions, which it calls as ``torch.nn.BatchNorm2d`` does."""

    def normalized(part: Tensor, valid: Tensor | None) -> Tensor:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        factor: Any = 1.0 / float(num_batches_tracked) if momentum is None else momentum  # type: ignore[arg-type]
        statistics = (running_mean, running_var)
        if valid is not None:
            return _without_padding(part, valid, *statistics, weight, bias, training, factor, eps)
        return torch.nn.functional.batch_norm(part, *statistics, weight, bias, training, factor, eps)

    if training and virtual_batch_size:
        parts = input.split(virtual_batch_size)
        masks = [None] * len(parts) if valid is None else valid.split(virtual_batch_size)
        output = torch.cat([normalized(*part) for part in zip(parts, masks, strict=True)])
    else:
        output = normalized(input, valid)
    residual, name, slope = epilogue or (None, "identity", 0.0)
    activated: Tensor = activations.compose(output if residual is None else output + residual, Activation(name, slope))
    if valid is None or residual is None:
        return activated
    return torch.where(valid.unsqueeze(1), activated, 0)


def _without_padding(
    input: Tensor,
    valid: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm of the values that are not padding, in training at least two a channel; 0 at padding."""
    keeps = valid.unsqueeze(1)
    x = torch.where(keeps, input, 0).to(_compute_type(input))
    mean, var = running_mean, running_var
    if training:
        dims = [0, *range(2, input.dim())]
        count = valid.sum()
        mean = x.sum(dims) / count
        var = torch.where(keeps, x - _per_channel(mean, x), 0).square().sum(dims) / count
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean.detach().to(running_mean.dtype), alpha=momentum)
        if running_var is not None:
            unbiased = (var * count / (count - 1)).detach()
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
    assert mean is not None
    assert var is not None
    return torch.where(keeps, normalized_by(x, mean, var, weight, bias, eps), 0).to(input.dtype)


def normalized_by(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(input - mean)/sqrt(var + eps)*weight + bias by torch's operators, in at least float32 and not rounded yet. The
    mean is subtracted first, as everywhere in bnext."""
    x = input.to(_compute_type(input))
    scale = torch.rsqrt(_per_channel(var, x) + eps)
    if weight is not None:
        scale = scale * _per_channel(weight, x)
    y = (x - _per_channel(mean, x)) * scale
    return y if bias is None else y + _per_channel(bias, x)


def _compute_type(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype).view((1, -1) + (1,) * (x.dim() - 2))
