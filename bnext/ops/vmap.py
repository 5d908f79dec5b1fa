"""Batching rules for ``torch.func.vmap``.

Batch norm treats channels independently, so a batch of problems is one problem with more channels: the batch dimension
is folded into the channel dimension, and taken out of the results again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnext.ops import operators as ops
from bnext.ops.operators import bind, number_of_parts

_Dims = tuple[int | None, ...]
_Batched = tuple[tuple[Tensor, ...], _Dims]

# Which dimension of an argument is that of the channels.
_CHANNEL_DIM = {"input": 1, "grad_output": 1, "residual": 1, "save_stats": 1, "mean_grads": 1}
_CHANNEL_DIM |= {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
_STATISTICS = ("running_mean", "running_var")


def _fold(tensor: Tensor, batch_dim: int | None, size: int, channel_dim: int) -> Tensor:
    """(..., C, ...) with a batch dimension somewhere, or none, to (..., size*C, ...)."""
    if batch_dim is None:
        shape = list(tensor.shape)
        shape.insert(channel_dim, size)
        moved = tensor.unsqueeze(channel_dim).expand(shape)
    else:
        moved = tensor.movedim(batch_dim, channel_dim)
    return moved.flatten(channel_dim, channel_dim + 1)


def _fold_all(given: dict[str, Any], dims: dict[str, int | None], size: int) -> dict[str, Any]:
    return {
        name: _fold(value, dims[name], size, _CHANNEL_DIM[name])
        if isinstance(value, Tensor) and name in _CHANNEL_DIM
        else value
        for name, value in given.items()
    }


def _unfold(tensor: Tensor, size: int, channels: int, channel_dim: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(channel_dim, (size, channels))
    return unfolded


def _channels(tensor: Tensor, batch_dim: int | None) -> int:
    """C of (N, C, ...) with a batch dimension somewhere, or none."""
    return tensor.shape[1 if batch_dim is None or batch_dim > 1 else 2]


def _each(op: Any, size: int, given: dict[str, Any], dims: dict[str, int | None]) -> _Batched:
    """Sample by sample, where samples do not fold into channels."""
    results = [
        op(*(v.select(dims[name], i) if isinstance(dims[name], int) else v for name, v in given.items()))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _forward(op: Any, size: int, channels: int, folded: dict[str, Any]) -> _Batched:
    output, save_stats, mask = op(*folded.values())
    return (_unfold(output, size, channels, 1), _unfold(save_stats, size, channels, 1), mask), (1, 1, None)


def _folds(given: dict[str, Any], dims: dict[str, int | None]) -> bool:
    """Whether the samples can be folded into the channels of one call: not if they have padding of their own, and not
    if the statistics have another dimension, for the parts of a batch."""
    return dims["valid"] is None and not given.get("virtual_batch_size")


def _eval(op: Any, size: int, given: dict[str, Any], dims: dict[str, int | None]) -> _Batched:
    if given["with_mask"] or not _folds(given, dims):
        return _each(op, size, given, dims)
    return _forward(op, size, _channels(given["input"], dims["input"]), _fold_all(given, dims, size))


def _train(op: Any, size: int, given: dict[str, Any], dims: dict[str, int | None]) -> _Batched:
    for name in _STATISTICS:
        if given[name] is not None and dims[name] is None:
            raise RuntimeError(
                f"batch_norm: expected {name} to be batched as the input is, since vmap would update it in place "
                "once for each sample, but it is not (see torch.func.stack_module_state, or use "
                "track_running_stats=False)"
            )
    counter, counted_apart = given["num_batches_tracked"], dims["num_batches_tracked"] is not None
    # With momentum=None and a counter for each sample, each sample has a factor of its own.
    counts_apart = counter is not None and counted_apart and given["momentum"] is None
    if given["with_mask"] or counts_apart or not _folds(given, dims):
        if counter is not None and not counted_apart:
            # A shared counter counts once: the samples get copies.
            given["num_batches_tracked"], dims["num_batches_tracked"] = torch.stack([counter] * size), 0
            images = given["input"].shape[1 if dims["input"] == 0 else 0]
            counter.add_(number_of_parts(images, given["virtual_batch_size"]))
        return _each(op, size, given, dims)
    if counter is not None and counted_apart:
        counter.add_(1)
        given["num_batches_tracked"] = None
    folded = _fold_all(given, dims, size)
    # Contiguous copies, which the operator writes to.
    updated = {name: folded[name].clone() for name in _STATISTICS if given[name] is not None}
    channels = _channels(given["input"], dims["input"])
    results = _forward(op, size, channels, folded | updated)
    for name, vector in updated.items():
        given[name].movedim(dims[name], 0).copy_(_unfold(vector, size, channels, 0))
    return results


def _backward(op: Any, size: int, given: dict[str, Any], dims: dict[str, int | None]) -> _Batched:
    if given["mask"] is not None or not _folds(given, dims):
        return _each(op, size, given, dims)
    wanted, channel_dims = given["output_mask"], (1, 0, 0, 1)
    channels = _channels(given["grad_output"], dims["grad_output"])
    results = op(*_fold_all(given, dims, size).values())
    outputs = tuple(
        _unfold(r, size, channels, d) if w else r for r, d, w in zip(results, channel_dims, wanted, strict=True)
    )
    return outputs, tuple(d if w else None for d, w in zip(channel_dims, wanted, strict=True))


def _all_reduce_sum(
    op: Any, size: int, given: dict[str, Any], dims: dict[str, int | None]
) -> tuple[Tensor, int | None]:
    return op(*given.values()), dims["tensor"]


def _register(op: Any, rule: Callable[..., Any]) -> None:
    def batched(info: Any, in_dims: _Dims, *args: Any, **kwargs: Any) -> Any:
        given = bind(op, args, kwargs)
        # Arguments left at their defaults have no entry in in_dims; a list has a list of dims.
        dims = dict.fromkeys(given) | {
            name: d if isinstance(d, int) else None for name, d in zip(given, in_dims, strict=False)
        }
        return rule(op, info.batch_size, given, dims)

    torch.library.register_vmap(op.name(), batched)


_register(ops.batch_norm_train, _train)
_register(ops.batch_norm_eval, _eval)
_register(ops.batch_norm_backward, _backward)
_register(ops.batch_norm_sync_backward, _backward)
_register(ops.all_reduce_sum, _all_reduce_sum)
