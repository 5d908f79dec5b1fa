"""Batch normalisation in float64, written from its formula: what the other tests compare with.

With m = N*spatial, mean = sum(x)/m, var = sum((x - mean)^2)/m, xhat = (x - mean)/sqrt(var + eps):

    y          = weight*xhat + bias
    grad_bias  = sum(g),  grad_weight = sum(g*xhat)
    grad_input = weight/sqrt(var + eps) * (g - grad_bias/m - xhat*grad_weight/m)      training
    grad_input = weight/sqrt(var + eps) * g                                           eval
    running    = (1 - momentum)*running + momentum*batch, the variance unbiased: var*m/(m - 1)

With a residual and an activation, z = weight*xhat + bias + residual is the pre-activation and y = act(z); then
g*act'(z) takes the place of g above, and is the residual's own gradient. s is the sigmoid, and P the distribution
function of the standard normal:

    relu        max(z, 0)               hardswish   z*clamp(z + 3, 0, 6)/6
    relu6       clamp(z, 0, 6)          gelu        z*P(z)
    leaky_relu  z or slope*z            mish        z*tanh(log(1 + e^z))
    silu        z*s(z)                  elu         z or alpha*(e^z - 1)

Inputs of a narrower type are widened first, so the reference sees the very values that bnext sees. Nothing here
calls torch's own batch norm, nor one of its activations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# An activation, as users name it; None is the identity.
Act = str | tuple[str, float] | None


class Forward(NamedTuple):
    """Everything in float64 on the CPU; `output`, the pre-activation `z` and `xhat` have the input's shape, the others
    have shape (C,)."""

    output: Tensor
    z: Tensor
    xhat: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor
    count: int


class Gradients(NamedTuple):
    """`residual` is also what reaches batch norm itself: g*act'(z)."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


def widen(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def along_channels(vector: Tensor, ndim: int) -> Tensor:
    """(C,) as (1, C, 1, ...) with `ndim` dimensions."""
    return vector.reshape(1, -1, *[1] * (ndim - 2))


def reduced_dims(ndim: int) -> list[int]:
    return [dim for dim in range(ndim) if dim != 1]


def named(act: Act) -> tuple[str, float]:
    """The activation's name, and the slope of a leaky_relu or the alpha of an elu."""
    if isinstance(act, tuple):
        return act
    return act or "identity", {"leaky_relu": 0.01, "elu": 1.0}.get(act or "", 0.0)


def activate(z: Tensor, act: Act) -> Tensor:
    """act(z), in operations that autograd, forward mode and vmap differentiate any number of times. At a kink the
    derivative is that of the lower side, at an upper kink that of the upper side, as in torch."""
    name, slope = named(act)
    if name == "identity":
        return z
    if name == "relu":
        return torch.where(z > 0, z, 0 * z)
    if name == "relu6":
        return torch.where(z >= 6, 6 + 0 * z, torch.where(z > 0, z, 0 * z))
    if name == "leaky_relu":
        return torch.where(z > 0, z, slope * z)
    if name == "silu":
        return z * torch.sigmoid(z)
    if name == "gelu":  # erfc gives P(z) to a few roundings of itself, in the negative tail as well
        return z * torch.special.erfc(z * -math.sqrt(0.5)) / 2
    if name == "hardswish":
        return torch.where(z <= -3, 0 * z, torch.where(z >= 3, z, z * (z + 3) / 6))
    if name == "mish":
        return z * torch.tanh(torch.logaddexp(z, torch.zeros_like(z)))
    if name == "elu":  # the side that is not taken is finite, or its derivative would be NaN
        return torch.where(z > 0, z, slope * z.clamp(max=0).expm1())
    raise ValueError(f"act: unknown {act!r}")


@torch.enable_grad()
def slope_at(z: Tensor, act: Act) -> Tensor:
    """act'(z)"""
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(activate(leaf, act).sum(), leaf)[0]


def forward(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    act: Act = None,
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
    z = xhat
    if weight is not None:
        z = z * along_channels(widen(weight), ndim)
    if bias is not None:
        z = z + along_channels(widen(bias), ndim)
    if residual is not None:
        z = z + widen(residual)
    return Forward(activate(z, act), z, xhat, mean, var, invstd, count)


def backward(
    grad_output: Tensor, fwd: Forward, weight: Tensor | None = None, *, training: bool, act: Act = None
) -> Gradients:
    g = widen(grad_output) * slope_at(fwd.z, act)
    dims, ndim = reduced_dims(g.ndim), g.ndim
    grad_bias = g.sum(dims)
    grad_weight = (g * fwd.xhat).sum(dims)
    scale = fwd.invstd if weight is None else fwd.invstd * widen(weight)
    core = g
    if training and fwd.count:
        core = (
            g - along_channels(grad_bias / fwd.count, ndim) - fwd.xhat * along_channels(grad_weight / fwd.count, ndim)
        )
    return Gradients(along_channels(scale, ndim) * core, grad_weight, grad_bias, g)


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
    *,
    residual: Tensor | None = None,
    act: Act = None,
) -> Tensor:
    """The forward formula in differentiable elementary operations, for autograd and torch.func to transform.

    Takes the arguments of `bnext.functional.batch_norm`, and a residual and an activation by keyword; leaves the
    running statistics alone.
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
    if residual is not None:
        output = output + residual
    return activate(output, act)
