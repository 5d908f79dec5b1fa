"""Fake kernels: shapes, strides and dtypes of the results, and the checks that can be made without data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext import _C
from bnext.ops import operators as ops
from bnext.ops.operators import bind, number_of_parts

_Results = tuple[Tensor, ...]


def _check(name: str, data: Tensor | None, given: dict[str, Any]) -> None:
    """The C++ kernels check this too, but a call with a tensor on the meta device comes here instead."""
    if not isinstance(data, Tensor):
        raise TypeError(f"batch_norm: expected {name} to be a tensor, but got {data}")
    if data.dim() < 2:
        raise ValueError(f"batch_norm: expected {name} to have at least 2 dimensions (N, C, ...), but got {data.shape}")
    for other, tensor in given.items():
        if isinstance(tensor, Tensor) and tensor.device != data.device:
            raise RuntimeError(
                f"batch_norm: expected {other} on the device of {name}, {data.device}, but got {tensor.device}"
            )


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """As format_of in csrc/tensor/tensors.cpp."""
    suggested: torch.memory_format = suggest_memory_format(tensor)
    if suggested != torch.contiguous_format or tensor.dim() not in (4, 5) or tensor.is_contiguous():
        return suggested
    last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return last if tensor.is_contiguous(memory_format=last) else suggested


def _is_empty(tensor: Tensor) -> bool:
    """Whether a tensor is known to be empty, without a guard."""
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _empty_like(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """As allocate_output in csrc/tensor/tensors.cpp."""
    return torch.empty_like(tensor) if _is_empty(tensor) else torch.empty_like(tensor, memory_format=memory_format)


def _is_transposed_sequence(tensor: Tensor) -> bool:
    """As in csrc/tensor/tensors.cpp."""
    if tensor.dim() != 3 or _is_empty(tensor) or tensor.is_contiguous():
        return False
    return tensor.transpose(1, 2).is_contiguous()


def _as_images(given: dict[str, Any]) -> dict[str, Any]:
    data = ("input", "grad_output", "residual")
    return given | {name: given[name].unsqueeze(2) for name in data if given.get(name) is not None}


def _as_sequences(images: Tensor) -> Tensor:
    return images.squeeze(2) if images.dim() == 4 else images


def _empty_mask(input: Tensor, act: str, with_mask: bool) -> Tensor:
    """A mask of the shape that csrc/common/mask.h reserves, without a branch on a size."""
    if not with_mask:
        return input.new_empty((0,), dtype=torch.uint8)
    if act not in _C.rectifiers:
        raise ValueError("batch_norm: expected with_mask=False, since only relu, relu6 and leaky_relu have a mask")
    n, c, *spatial = input.shape
    positions = math.prod(spatial)
    planes = _memory_format(input) == torch.contiguous_format and positions != 1
    elements = positions if planes else c
    lanes = _C.cpu_mask_lanes if input.device.type == "cpu" else _C.cuda_mask_bytes // input.element_size()
    touched = (elements + lanes - 1) // lanes
    row = (touched + touched - elements // lanes + 3) // 4 * 4
    return input.new_empty((n, c, row) if planes else (n * positions, row), dtype=torch.uint8)


def _forward(given: dict[str, Any]) -> _Results:
    """Output, statistics and mask of training, evaluation and gathered stats; ``batch_norm_sync`` and
    ``batch_norm_recompute`` return only the output."""
    input = given["input"]
    _check("input", input, given)
    if _is_transposed_sequence(input):
        images, save_stats, mask = _forward(_as_images(given))
        return _as_sequences(images), save_stats, mask
    output = _empty_like(input, _memory_format(input))
    size: int | None = given.get("virtual_batch_size")
    parts = [number_of_parts(input.shape[0], size)] if size else []
    save_stats = input.new_empty((*parts, 2, input.shape[1]), dtype=torch.float64)
    return output, save_stats, _empty_mask(input, given["act"], given.get("with_mask", False))


def _output(given: dict[str, Any]) -> Tensor:
    return _forward(given)[0]


def _stats(given: dict[str, Any]) -> Tensor:
    input: Tensor = given["input"]
    _check("input", input, given)
    stats: Tensor = input.new_empty((2 * input.shape[1] + 1,), dtype=torch.float64)
    return stats


def _backward(given: dict[str, Any]) -> _Results:
    mask, wanted = given["mask"], given["output_mask"]
    _check("grad_output", given["grad_output"], given)
    like: Tensor = given["grad_output"] if given["input"] is None else given["input"]
    _check("input", like, {})
    as_images = _is_transposed_sequence(like) if mask is None else mask.dim() == 2 and like.shape[2:] != (1,)
    if like.dim() == 3 and as_images:
        dx, dweight, dbias, dresidual = _backward(_as_images(given))
        return _as_sequences(dx), dweight, dbias, _as_sequences(dresidual)
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    channels = like.shape[1]
    # A mask's rank tells the forward call's memory format.
    memory_format = _memory_format(like)
    if mask is not None:
        planes = mask.dim() == 3 or like.dim() < 4
        last = torch.channels_last if like.dim() == 4 else torch.channels_last_3d
        memory_format = torch.contiguous_format if planes else last

    def data(wanted: bool) -> Tensor:
        return _empty_like(like, memory_format) if wanted else like.new_empty((0,))

    def vector(wanted: bool) -> Tensor:
        return like.new_empty((channels if wanted else 0,), dtype=sums)

    return data(wanted[0]), vector(wanted[1]), vector(wanted[2]), data(wanted[3])


def _sequence_mask(given: dict[str, Any]) -> Tensor:
    lengths, device = given["lengths"], given["device"]
    if lengths.device.type == "meta" != device.type:
        raise RuntimeError(
            f"batch_norm: expected lengths on the CPU or on the device of input, {device}, but got {lengths.device}"
        )
    return torch.empty((given["batch"], given["size"]), dtype=torch.bool, device=device)


def _all_reduce_sum(given: dict[str, Any]) -> Tensor:
    return torch.empty_like(given["tensor"], memory_format=torch.contiguous_format)


def _register(op: Any, fake: Callable[[dict[str, Any]], Any]) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return fake(bind(op, args, kwargs))

    torch.library.register_fake(op.name(), kernel)


_register(ops.batch_norm_train, _forward)
_register(ops.batch_norm_eval, _forward)
_register(ops.batch_norm_gathered, _forward)
_register(ops.batch_norm_sync, _output)
_register(ops.batch_norm_recompute, _output)
_register(ops.batch_norm_stats, _stats)
_register(ops.batch_norm_backward, _backward)
_register(ops.batch_norm_sync_backward, _backward)
_register(ops.sequence_mask, _sequence_mask)
_register(ops.all_reduce_sum, _all_reduce_sum)
