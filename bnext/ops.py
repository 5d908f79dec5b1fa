"""The operators ``torch.ops.bnext.*``: what torch must know of them besides their C++ kernels.

Importing this module loads the extension, which registers the operators and their derivatives. Here stand the fake
kernels (shapes and strides without data, for torch.compile and torch.export) and the batching rules for
``torch.func.vmap``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext import _C  # also registers the operators

batch_norm_train = torch.ops.bnext.batch_norm_train.default
batch_norm_eval = torch.ops.bnext.batch_norm_eval.default
batch_norm_backward = torch.ops.bnext.batch_norm_backward.default
batch_norm_moments = torch.ops.bnext.batch_norm_moments.default
batch_norm_merged = torch.ops.bnext.batch_norm_merged.default
batch_norm_sync = torch.ops.bnext.batch_norm_sync.default

_InDims = tuple[int | None, ...]
_Batched = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def _check_devices(reference: str, like: Tensor, **others: Tensor | None) -> None:
    # The C++ kernels check this too, but a tensor on the meta device brings the call here instead of there.
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(
                f"batch_norm: expected {name} on the device of {reference}, {like.device}, but got {tensor.device}"
            )


def _check_rank(name: str, tensor: Tensor) -> None:
    if tensor.dim() < 2:
        raise ValueError(
            f"batch_norm: expected {name} to have at least 2 dimensions (N, C, ...), but got {tensor.shape}"
        )


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """As format_of in csrc/batch_norm.cpp."""
    suggested: torch.memory_format = suggest_memory_format(tensor)
    if suggested != torch.contiguous_format or tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return suggested
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return last if tensor.is_contiguous(memory_format=last) else suggested


def _empty_output(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=_memory_format(like))


def _empty_mask(input: Tensor, act: str, with_mask: bool) -> Tensor:
    """As csrc/common/mask.h reserves it, without a branch on a size."""
    if not with_mask:
        return input.new_empty((0,), dtype=torch.uint8)
    if act not in _C.rectifiers:
        raise ValueError("batch_norm: expected with_mask=False, since only relu, relu6 and leaky_relu have a mask")
    n, c, *spatial = input.shape
    positions = math.prod(spatial)
    planes = _memory_format(input) == torch.contiguous_format and positions != 1
    elements = positions if planes else c
    lanes = 8 if input.device.type == "cpu" else 16 // input.element_size()
    touched = (elements + lanes - 1) // lanes
    row = (touched + touched - elements // lanes + 3) // 4 * 4
    return input.new_empty((n, c, row) if planes else (n * positions, row), dtype=torch.uint8)


def _fake_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rank("input", input)
    _check_devices(
        "input",
        input,
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        residual=residual,
    )
    save_stats = input.new_empty((2, input.shape[1]), dtype=torch.float64)
    return _empty_output(input), save_stats, _empty_mask(input, act, with_mask)


def _fake_eval(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_train(input, weight, bias, running_mean, running_var, None, None, eps, residual, act, slope, with_mask)


def _fake_moments(input: Tensor, eps: float) -> Tensor:
    _check_rank("input", input)
    return input.new_empty((2 * input.shape[1] + 1,), dtype=torch.float64)


def _fake_merged(input: Tensor, moments: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices("input", input, moments=moments)
    return _fake_train(input, *args, **kwargs)


def _fake_sync(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    group_size: int,
    group_name: str,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
) -> Tensor:
    vectors = (weight, bias, running_mean, running_var, num_batches_tracked)
    output, _, _ = _fake_train(input, *vectors, momentum, eps, residual, act, slope)
    return output


def _fake_backward(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    save_stats: Tensor,
    training: bool,
    eps: float,
    output_mask: list[bool],
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    mean_grads: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_devices(
        "grad_output",
        grad_output,
        input=input,
        weight=weight,
        save_stats=save_stats,
        bias=bias,
        residual=residual,
        mask=mask,
        mean_grads=mean_grads,
    )
    like = grad_output if input is None else input
    _check_rank("grad_output", grad_output)
    _check_rank("input", like)
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    channels = like.shape[1]
    # A mask is tied to the forward call's memory format.
    memory_format = _memory_format(like)
    if mask is not None:
        planes = mask.dim() == 3 or like.dim() < 4
        last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
        memory_format = torch.contiguous_format if planes else last

    def data(wanted: bool) -> Tensor:
        return torch.empty_like(like, memory_format=memory_format) if wanted else like.new_empty((0,))

    return (
        data(output_mask[0]),
        like.new_empty((channels if output_mask[1] else 0,), dtype=sums),
        like.new_empty((channels if output_mask[2] else 0,), dtype=sums),
        data(output_mask[3]),
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


def _dim(in_dims: _InDims, position: int) -> int | None:
    """Arguments left at their defaults have no entry."""
    return in_dims[position] if position < len(in_dims) else None


def _fold_residual(residual: Tensor | None, in_dims: _InDims, position: int, size: int) -> Tensor | None:
    return _fold_optional(residual, _dim(in_dims, position), size, 1)


def _unfold(tensor: Tensor, size: int, channels: int, channel_dim: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(channel_dim, (size, channels))
    return unfolded


def _channels(tensor: Tensor, batch_dim: int | None) -> int:
    """C of (N, C, ...) with a batch dimension somewhere, or none."""
    return tensor.shape[1 if batch_dim is None or batch_dim > 1 else 2]


def _each(op: Any, info: Any, in_dims: _InDims, args: tuple[Any, ...]) -> _Batched:
    """Sample by sample, where samples do not fold into channels."""
    dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
    results = []
    for i in range(info.batch_size):
        # A list has a list of dims.
        results.append(op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, dims, strict=True))))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _vmap_eval(
    info: Any,
    in_dims: _InDims,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    with_mask: bool = False,
) -> _Batched:
    if with_mask:
        args = (input, weight, bias, running_mean, running_var, eps, residual, act, slope, with_mask)
        return _each(batch_norm_eval, info, in_dims, args)
    size, channels = info.batch_size, _channels(input, in_dims[0])
    output, save_stats, mask = batch_norm_eval(
        _fold(input, in_dims[0], size, 1),
        _fold_optional(weight, in_dims[1], size, 0),
        _fold_optional(bias, in_dims[2], size, 0),
        _fold(running_mean, in_dims[3], size, 0),
        _fold(running_var, in_dims[4], size, 0),
        eps,
        _fold_residual(residual, in_dims, 6, size),
        act,
        slope,
    )
    return (_unfold(output, size, channels, 1), _unfold(save_stats, size, channels, 1), mask), (1, 1, None)


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
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    with_mask: bool = False,
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
    counter, counter_dim = num_batches_tracked, in_dims[5]
    # One counter a sample gives, with momentum=None, each a factor of its own.
    if with_mask or (counter is not None and counter_dim is not None and momentum is None):
        shared = counter is not None and counter_dim is None
        if counter is not None and shared:
            # It counts once: the samples see copies.
            in_dims = (*in_dims[:5], 0, *in_dims[6:])
            num_batches_tracked = torch.stack([counter] * size)
            counter.add_(1)
        args = (input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        return _each(batch_norm_train, info, in_dims, (*args, residual, act, slope, with_mask))
    if counter is not None and counter_dim is not None:
        counter.add_(1)
        num_batches_tracked = None
    running = [
        None if tensor is None else _fold(tensor, dim, size, 0).clone()
        for tensor, dim in ((running_mean, in_dims[3]), (running_var, in_dims[4]))
    ]
    output, save_stats, mask = batch_norm_train(
        _fold(input, in_dims[0], size, 1),
        _fold_optional(weight, in_dims[1], size, 0),
        _fold_optional(bias, in_dims[2], size, 0),
        *running,
        num_batches_tracked,
        momentum,
        eps,
        _fold_residual(residual, in_dims, 8, size),
        act,
        slope,
    )
    for tensor, dim, updated in (
        (running_mean, in_dims[3], running[0]),
        (running_var, in_dims[4], running[1]),
    ):
        if tensor is not None and dim is not None and updated is not None:
            tensor.movedim(dim, 0).copy_(_unfold(updated, size, channels, 0))
    return (_unfold(output, size, channels, 1), _unfold(save_stats, size, channels, 1), mask), (1, 1, None)


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
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.0,
    mean_grads: Tensor | None = None,
) -> _Batched:
    if mask is not None:
        args = (grad_output, input, weight, save_stats, training, eps, output_mask, bias, residual, mask, act, slope)
        return _each(batch_norm_backward, info, in_dims, (*args, mean_grads))
    size, channels = info.batch_size, _channels(grad_output, in_dims[0])
    results = batch_norm_backward(
        _fold(grad_output, in_dims[0], size, 1),
        _fold_optional(input, in_dims[1], size, 1),
        _fold_optional(weight, in_dims[2], size, 0),
        _fold(save_stats, in_dims[3], size, 1),
        training,
        eps,
        output_mask,
        _fold_optional(bias, _dim(in_dims, 7), size, 0),
        _fold_residual(residual, in_dims, 8, size),
        None,
        act,
        slope,
        _fold_optional(mean_grads, _dim(in_dims, 12), size, 1),
    )
    channel_dims = (1, 0, 0, 1)
    outputs = tuple(
        _unfold(result, size, channels, dim) if wanted else result
        for result, dim, wanted in zip(results, channel_dims, output_mask, strict=True)
    )
    return outputs, tuple(dim if wanted else None for dim, wanted in zip(channel_dims, output_mask, strict=True))


torch.library.register_fake("bnext::batch_norm_train", _fake_train)
torch.library.register_fake("bnext::batch_norm_eval", _fake_eval)
torch.library.register_fake("bnext::batch_norm_backward", _fake_backward)
torch.library.register_fake("bnext::batch_norm_moments", _fake_moments)
torch.library.register_fake("bnext::batch_norm_merged", _fake_merged)
torch.library.register_fake("bnext::batch_norm_sync", _fake_sync)
torch.library.register_vmap("bnext::batch_norm_eval", _vmap_eval)
torch.library.register_vmap("bnext::batch_norm_train", _vmap_train)
torch.library.register_vmap("bnext::batch_norm_backward", _vmap_backward)
