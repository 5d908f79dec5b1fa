"""What a batch norm, with an activation or without, should give: float64, from the formula, and how far off it may be.

The gradient of an activation jumps at a kink, as ReLU's does at zero. An element that is closer to it than rounding can
tell may be on either side, and is given no gradient to pass on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.closeness import MismatchError
from benchmarks.operators import ACTIVATIONS, EPS, MOMENTUM, Provider, Tensors, results
from benchmarks.suites import Case

# Of larger tensors as many channels as have so many elements: float64 takes a CPU a quarter of a second for them.
CHECKED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

# Temporaries of a few channels fit a CPU's cache; a GPU wants more at once.
PIECE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}

# Where an activation's derivative jumps; the most that its second derivative is elsewhere.
KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}
CURVATURE = {"relu": 0.0, "hardswish": 1 / 3, "silu": 0.5, "gelu": 0.8}
MAX_SLOPE = 1.5  # hardswish's; the others' are below 1.13

DATA = ("output", "grad_input", "grad_residual", "eval output")


def spread(channels: int, number: int) -> list[int]:
    """So many channels, or all: the first, the last, others evenly between them."""
    number = min(number, channels)
    return sorted({index * (channels - 1) // max(number - 1, 1) for index in range(number)})


def by_channel(tensor: Tensor, index: Tensor) -> Tensor:
    """Some channels: (c, count) of the data, (c, 1) of a parameter or a statistic."""
    some = tensor.detach().index_select(min(tensor.dim() - 1, 1), index)
    return some.transpose(0, 1).flatten(1) if some.dim() > 1 else some[:, None]


def slope(act: str, z: Tensor) -> Tensor:
    """The activation's derivative."""
    if not act:
        return torch.ones_like(z)
    leaf = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[act](leaf).sum(), leaf)[0]


@dataclass(frozen=True)
class Bounds:
    """Relative errors of a rounding and of a result, absolute ones of values of size one and of a channel's sum."""

    unit: float
    rtol: float
    atol: float
    sum_atol: float

    @staticmethod
    def of(case: Case) -> "Bounds":
        """What rounding explains.

        A result is rounded once, and where an activation follows, what comes before is rounded as well. Statistics
        are sums of ``count`` terms; the error of such a sum in plain float32, which torch's channels_last path uses,
        grows as sqrt(count) units of rounding, with 8 for the tail over all channels. A gradient of a parameter is
        not divided by ``count``: as a sum of ``count`` random terms it is sqrt(count) large, and its error grows by
        as much.
        """
        eps = torch.finfo(getattr(torch, case.dtype)).eps
        sum_eps = torch.finfo(torch.float64 if case.dtype == "float64" else torch.float32).eps
        atol = max(8 * sqrt(case.count), 100) * sum_eps
        fused = bool(case.epilogue.act)
        return Bounds(fused * eps / 2, (1 + fused) * eps, atol, atol * sqrt(case.count))


class Channels:
    """Some channels of a case in float64, and what is expected of them."""

    def __init__(self, act: str, bounds: Bounds, tensors: Mapping[str, Tensor]) -> None:
        self._act = act
        self._bounds = bounds
        self._t = {name: tensor.double() for name, tensor in tensors.items()}
        x = self._t["input"]
        self._mean = x.mean(1, keepdim=True)
        centred = x - self._mean
        self._var = centred.square().mean(1, keepdim=True)
        self._invstd = (self._var + EPS).rsqrt()
        self._xhat = centred * self._invstd
        self._z, self._z_error = self._preactivation(self._xhat)

    def _preactivation(self, xhat: Tensor) -> tuple[Tensor, Tensor]:
        """The activation's argument; torch rounds it, and the batch norm before the addition, to the data's dtype."""
        z = y = self._t["weight"] * xhat + self._t["bias"]
        size = y.abs()
        if "residual" in self._t:
            z = y + self._t["residual"]
            size += z.abs()
        return z, size.mul_(self._bounds.unit).add_(self._bounds.atol)

    def _activated(self, z: Tensor, z_error: Tensor) -> tuple[Tensor, Tensor]:
        if not self._act:
            return z, z.abs().mul_(self._bounds.rtol).add_(z_error)
        output = ACTIVATIONS[self._act](z)
        return output, output.abs().mul_(self._bounds.rtol).add_(z_error, alpha=MAX_SLOPE)

    def near_kinks(self) -> Tensor:
        """Where rounding may decide which side of a kink the activation's argument is on."""
        distances = [(self._z - kink).abs() for kink in KINKS.get(self._act, ())]
        return sum((distance <= self._z_error for distance in distances), torch.zeros_like(self._z, dtype=torch.bool))

    def expected(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each tensor's name, values and errors; (c, count) and (c, 1)."""
        bounds, count = self._bounds, self._xhat.shape[1]
        yield "output", *self._activated(self._z, self._z_error)
        updates = {"running_mean": self._mean, "running_var": self._var * (count / (count - 1))}
        for name, update in updates.items():
            value = (1 - MOMENTUM) * self._t[name] + MOMENTUM * update
            yield name, value, value.abs() * bounds.rtol + bounds.atol
        xhat = (self._t["input"] - self._t["running_mean"]) * (self._t["running_var"] + EPS).rsqrt()
        yield "eval output", *self._activated(*self._preactivation(xhat))
        yield from self._gradients()

    def _gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """From the formula; the error of what comes to the batch norm's backward is carried through it."""
        bounds, xhat, count = self._bounds, self._xhat, self._xhat.shape[1]
        dy = self._t["grad_output"]
        dz = dy * slope(self._act, self._z)
        sum_dz, sum_dz_xhat = dz.sum(1, keepdim=True), (dz * xhat).sum(1, keepdim=True)
        scale = self._t["weight"] * self._invstd
        grad_input = scale * (dz - sum_dz / count - xhat * (sum_dz_xhat / count))
        curvature = CURVATURE.get(self._act, 0.0)
        dz_error = dz.new_zeros(1, 1)
        if curvature:  # otherwise slopes are 0 or 1, which round nothing
            dz_error = dz.abs() * bounds.unit + dy.abs() * self._z_error * curvature
        size = xhat.abs()
        sum_error = dz_error.sum(1, keepdim=True) + bounds.sum_atol
        sum_xhat_error = (dz_error * size).sum(1, keepdim=True) + bounds.sum_atol
        carried = scale.abs() * (dz_error + sum_error / count + size * (sum_xhat_error / count))
        yield "grad_input", grad_input, grad_input.abs() * bounds.rtol + bounds.atol + carried
        yield "grad_weight", sum_dz_xhat, sum_dz_xhat.abs() * bounds.rtol + sum_xhat_error
        yield "grad_bias", sum_dz, sum_dz.abs() * bounds.rtol + sum_error
        if "residual" in self._t:
            yield "grad_residual", dz, dz.abs() * bounds.rtol + dz_error


class Checker:
    """Compares with float64, every element of the channels that it looks at."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        device = tensors.input.device.type
        channels = spread(case.shape[1], max(2, CHECKED_ELEMENTS[device] // case.count))
        self._index = torch.tensor(channels, device=tensors.input.device)
        self._piece = max(1, PIECE_ELEMENTS[device] // case.count)
        self._tensors = tensors
        if case.epilogue.act in KINKS:
            self._tensors = replace(tensors, grad_output=tensors.grad_output.clone())
            by_channels = self._tensors.grad_output.movedim(1, 0)
            for index, some in self._pieces():
                kept = by_channels[index]
                by_channels[index] = kept.masked_fill(some.near_kinks().view_as(kept), 0)

    def _pieces(self) -> Iterator[tuple[Tensor, Channels]]:
        """Some channels after the other."""
        names = ("input", "weight", "bias", "running_mean", "running_var", "grad_output")
        given = {name: getattr(self._tensors, name) for name in names}
        given.update(zip(("residual",), self._tensors.residual, strict=False))
        with set_torch_threads(1):  # a piece is too small for a second one
            for index in self._index.split(self._piece):
                some = {name: by_channel(tensor, index) for name, tensor in given.items()}
                yield index, Channels(self._case.epilogue.act, Bounds.of(self._case), some)

    def check(self, provider: Provider) -> None:
        """Raise MismatchError at the first tensor that is not right."""
        with provider.context():
            actual = results(provider.function, self._tensors)
        where = f"{self._case}: {{}} of {provider.name}"
        for name in DATA:
            if name in actual:
                require_kind(where.format(name), actual[name], self._tensors.input)
        for index, some in self._pieces():
            for name, value, error in some.expected():
                rows = by_channel(actual[name], index)
                require_close(f"{where.format(name)} is not float64's", rows, value, error, index)


def require_kind(what: str, actual: Tensor, input: Tensor) -> None:
    """Results of the data's size have the input's dtype, shape and layout."""
    for name in ("dtype", "shape"):
        if getattr(actual, name) != getattr(input, name):
            raise MismatchError(f"{what} has {name} {getattr(actual, name)}, not {getattr(input, name)}")
    if actual.stride() != input.stride():
        raise MismatchError(f"{what} has strides {actual.stride()}, not {input.stride()}")


def require_close(what: str, actual: Tensor, expected: Tensor, error: Tensor, channels: Tensor) -> None:
    """Name the worst of the channels. NaN is close to nothing."""
    excess = (actual.double() - expected).abs_().sub_(error)
    if not excess.amax() <= 0:
        worst = excess.nan_to_num(nan=torch.inf).amax(1)
        raise MismatchError(f"{what}: channel {channels[worst.argmax()]} is {float(worst.amax()):.3g} too far off")
