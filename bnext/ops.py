"""The operators ``torch.ops.bnext.*``: what torch must know of them besides their C++ kernels.

Importing this module loads the extension, which registers the operators and their derivatives. Here stand the fake
kernels (shapes and strides without data, for torch.compile and torch.export) and the batching rules for
``torch.func.vmap``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext import _C  # noqa: F401  (registers the operators)

batch_norm_train = torch.ops.bnext.batch_norm_train.default
batch_norm_eval = torch.ops.bnext.batch_norm_eval.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default

_InDims = tuple[int | None, ...]
_Batched = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def _check_devices(reference: str, like: Tensor, **others: Tensor | None) -> None:
    # The C++ kernels check this too, but a tensor on the meta device brings the call here instead of there.
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(
                f"batch_norm: expected {name} on the device of {reference}, {like.device}, but got {tensor.device}"
            )


def _empty_output(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=suggest_memory_format(like))


def _fake_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check_devices(
        "input",
        input,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
    )
    return _empty_output(input), input.new_empty((2, input.shape[1]), dtype=torch.float64)


def _fake_eval(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check_devices("input", input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    return _empty_output(input), input.new_empty((2, input.shape[1]), dtype=torch.float64)


def _fake_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    save_stats: Tensor,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("grad_output", grad_output, input=input, weight=weight, save_stats=save_stats)
    like = grad_output if input is None else input
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    channels = like.shape[1]
    return (
        _empty_output(like) if output_mask[0] else like.new_empty((0,)),
        like.new_empty((channels if output_mask[1] else 0,), dtype=sums),
        like.new_empty((channels if output_mask[2] else 0,), dtype=sums),
    )


# Batch norm treats channels independently, so a batch of problems is one problem with more channels: the batch
# dimension is folded into the channel dimension, and taken out of the results again.


def _fold(tensor: Tensor, batch_dim: int | None, size: int, channel_dim: int) -> Tensor:
    """(..., C, ...) with a batch dimension somewhere, or none, to (..., size*C, ...)."""
    if batch_dim is None:
        shape = list(tensor.shape)
        shape.insert(channel_dim, size)
        moved = tensor.unsqueeze(channel_dim).expand(shape)
    else:
        moved = tensor.movedim(batch_dim, channel_dim)
    return moved.flatten(channel_dim, channel_dim + 1)


def _fold_optional(tensor: Tensor | None, batch_dim: int | None, size: int, channel_dim: int) -> Tensor | None:
    return None if tensor is None else _fold(tensor, batch_dim, size, channel_dim)


def _unfold(tensor: Tensor, size: int, channels: int, channel_dim: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(channel_dim, (size, channels))
    return unfolded


def _channels(tensor: Tensor, batch_dim: int | None) -> int:
    """C of (N, C, ...) with a batch dimension somewhere, or none."""
    return tensor.shape[1 if batch_dim is None or batch_dim > 1 else 2]


def _vmap_eval(
    info: Any,
    in_dims: _InDims,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
) -> _Batched:
    size, channels = info.batch_size, _channels(input, in_dims[0])
    output, save_stats = batch_norm_eval(
        _fold(input, in_dims[0], size, 1),
        _fold_optional(weight, in_dims[1], size, 0),
        _fold_optional(bias, in_dims[2], size, 0),
        _fold(running_mean, in_dims[3], size, 0),
        _fold(running_var, in_dims[4], size, 0),
        eps,
    )
    return (_unfold(output, size, channels, 1), _unfold(save_stats, size, channels, 1)), (1, 1)


def _vmap_train(
    info: Any,
    in_dims: _InDims,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> _Batched:
    size, channels = info.batch_size, _channels(input, in_dims[0])
    for name, tensor, dim in (
        ("running_mean", running_mean, in_dims[3]),
        ("running_var", running_var, in_dims[4]),
    ):
        if tensor is not None and dim is None:
            raise RuntimeError(
                f"batch_norm: expected {name} to be batched as the input is, since vmap would update it in place "
                "once for each sample, but it is not (see torch.func.stack_module_state, or use "
                "track_running_stats=False)"
            )
    counter_dim = in_dims[5]
    if num_batches_tracked is not None and counter_dim is not None:
        # One counter a sample: each counts this batch, and with momentum=None each gives a factor of its own.
        num_batches_tracked.add_(1)
        if momentum is None:
            return _train_each(info, in_dims, input, weight, bias, running_mean, running_var, num_batches_tracked, eps)
        num_batches_tracked = None
    running = [
        None if tensor is None else _fold(tensor, dim, size, 0).clone()
        for tensor, dim in ((running_mean, in_dims[3]), (running_var, in_dims[4]))
    ]
    output, save_stats = batch_norm_train(
        _fold(input, in_dims[0], size, 1),
        _fold_optional(weight, in_dims[1], size, 0),
        _fold_optional(bias, in_dims[2], size, 0),
        *running,
        num_batches_tracked,
        momentum,
        eps,
    )
    for tensor, dim, updated in (
        (running_mean, in_dims[3], running[0]),
        (running_var, in_dims[4], running[1]),
    ):
        if tensor is not None and dim is not None and updated is not None:
            tensor.movedim(dim, 0).copy_(_unfold(updated, size, channels, 0))
    return (_unfold(output, size, channels, 1), _unfold(save_stats, size, channels, 1)), (1, 1)


def _train_each(
    info: Any,
    in_dims: _InDims,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor,
    eps: float,
) -> _Batched:
    """Sample by sample, for momentum=None, where num_batches_tracked gives each a factor of its own."""
    tensors = (input, weight, bias, running_mean, running_var)
    outputs, stats = [], []
    for i in range(info.batch_size):
        sample = [t if t is None or dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=False)]
        output, save_stats = batch_norm_train(*sample, None, 1.0 / float(num_batches_tracked.flatten()[i]), eps)
        outputs.append(output)
        stats.append(save_stats)
    return (torch.stack(outputs), torch.stack(stats)), (0, 0)


def _vmap_backward(
    info: Any,
    in_dims: _InDims,
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    save_stats: Tensor,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> _Batched:
    size, channels = info.batch_size, _channels(grad_output, in_dims[0])
    grad_input, grad_weight, grad_bias = batch_norm_backward(
        _fold(grad_output, in_dims[0], size, 1),
        _fold_optional(input, in_dims[1], size, 1),
        _fold_optional(weight, in_dims[2], size, 0),
        _fold(save_stats, in_dims[3], size, 1),
        training,
        eps,
        output_mask,
    )
    outputs = (
        _unfold(grad_input, size, channels, 1) if output_mask[0] else grad_input,
        _unfold(grad_weight, size, channels, 0) if output_mask[1] else grad_weight,
        _unfold(grad_bias, size, channels, 0) if output_mask[2] else grad_bias,
    )
    dims = (
        1 if output_mask[0] else None,
        0 if output_mask[1] else None,
        0 if output_mask[2] else None,
    )
    return outputs, dims


torch.library.register_fake("bnext::batch_norm_train", _fake_train)
torch.library.register_fake("bnext::batch_norm_eval", _fake_eval)
torch.library.register_fake("bnext::batch_norm_backward", _fake_backward)
torch.library.register_vmap("bnext::batch_norm_eval", _vmap_eval)
torch.library.register_vmap("bnext::batch_norm_train", _vmap_train)
torch.library.register_vmap("bnext::batch_norm_backward", _vmap_backward)
