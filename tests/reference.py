"""Batch normalisation in float64, written from the formula of the contract: what the other tests compare with.

With m = N*spatial, mean = sum(x)/m, var = sum((x - mean)^2)/m, xhat = (x - mean)/sqrt(var + eps):

    y          = weight*xhat + bias
    grad_bias  = sum(g),  grad_weight = sum(g*xhat)
    grad_input = weight/sqrt(var + eps) * (g - grad_bias/m - xhat*grad_weight/m)      training
    grad_input = weight/sqrt(var + eps) * g                                           eval
    running    = (1 - momentum)*running + momentum*batch, the variance unbiased: var*m/(m - 1)

Inputs of a narrower type are widened first, so the reference sees the very values that bnext sees. Nothing here
calls torch's own batch norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """Everything in float64 on the CPU; `output` and `xhat` have the input's shape, the others have shape (C,)."""

    output: Tensor
    xhat: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor
    count: int


class Gradients(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor


def widen(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def along_channels(vector: Tensor, ndim: int) -> Tensor:
    """(C,) as (1, C, 1, ...) with `ndim` dimensions."""
    return vector.reshape(1, -1, *[1] * (ndim - 2))


def reduced_dims(ndim: int) -> list[int]:
    return [dim for dim in range(ndim) if dim != 1]


def forward(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Forward:
    """Normalise with the running statistics where they are given, with those of the batch where not."""
    x = widen(input)
    channels, ndim = x.shape[1], x.ndim
    count = x.numel() // channels
    if running_mean is not None and running_var is not None:
        mean, var = widen(running_mean), widen(running_var)
        centred = x - along_channels(mean, ndim)
    elif count == 0:
        mean, var = torch.zeros(channels, dtype=x.dtype), torch.zeros(channels, dtype=x.dtype)
        centred = x
    else:
        # Moving the origin to the first value costs the reference no accuracy for data far from zero, and makes a
        # constant channel exact.
        origin = x.transpose(0, 1).reshape(channels, -1)[:, 0]
        moved = x - along_channels(origin, ndim)
        moved_mean = moved.mean(reduced_dims(ndim))
        mean = origin + moved_mean
        centred = moved - along_channels(moved_mean, ndim)
        var = centred.square().mean(reduced_dims(ndim))
    invstd = (var + eps).rsqrt()
    xhat = centred * along_channels(invstd, ndim)
    output = xhat
    if weight is not None:
        output = output * along_channels(widen(weight), ndim)
    if bias is not None:
        output = output + along_channels(widen(bias), ndim)
    return Forward(output, xhat, mean, var, invstd, count)


def backward(grad_output: Tensor, fwd: Forward, weight: Tensor | None = None, *, training: bool) -> Gradients:
    g = widen(grad_output)
    dims, ndim = reduced_dims(g.ndim), g.ndim
    grad_bias = g.sum(dims)
    grad_weight = (g * fwd.xhat).sum(dims)
    scale = fwd.invstd if weight is None else fwd.invstd * widen(weight)
    core = g
    if training and fwd.count:
        core = (
            g - along_channels(grad_bias / fwd.count, ndim) - fwd.xhat * along_channels(grad_weight / fwd.count, ndim)
        )
    return Gradients(along_channels(scale, ndim) * core, grad_weight, grad_bias)


def updated_running_stats(
    running_mean: Tensor, running_var: Tensor, fwd: Forward, momentum: float
) -> tuple[Tensor, Tensor]:
    if fwd.count == 0:
        return widen(running_mean), widen(running_var)
    unbiased = fwd.var * (fwd.count / (fwd.count - 1))
    return (
        (1 - momentum) * widen(running_mean) + momentum * fwd.mean,
        (1 - momentum) * widen(running_var) + momentum * unbiased,
    )


def composite(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """The forward formula in differentiable elementary operations, for autograd and torch.func to transform.

    Takes the arguments of `bnext.functional.batch_norm`; leaves the running statistics alone.
    """
    ndim = input.ndim
    if training:
        mean = input.mean(reduced_dims(ndim))
        var = (input - along_channels(mean, ndim)).square().mean(reduced_dims(ndim))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    output = (input - along_channels(mean, ndim)) * along_channels((var + eps).rsqrt(), ndim)
    if weight is not None:
        output = output * along_channels(weight, ndim)
    if bias is not None:
        output = output + along_channels(bias, ndim)
    return output
