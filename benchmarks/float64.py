"""What a batch norm, with an activation or without, should give: float64, from the formula, and how far off it may be.

The gradient of an activation jumps at a kink, as ReLU's does at zero. Whether an element that is closer to it than
rounding can tell is on one side or the other is for a provider to say: its gradient is asked which side it took, and
all that follows from that side is then expected of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.check import MismatchError, results
from benchmarks.operations import EPS, MOMENTUM, Tensors
from benchmarks.providers import ACTIVATIONS, Provider
from benchmarks.suites import TORCH_COMPILE, Case

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
    def of(case: Case, coarse: bool = False) -> "Bounds":
        """What rounding explains.

        A result is rounded once, and where an activation follows, what comes before is rounded as well. Statistics
        are sums of ``count`` terms; the error of such a sum in plain float32, which torch's channels_last path uses,
        grows as sqrt(count) units of rounding, with 8 for the tail over all channels. A gradient of a parameter is
        not divided by ``count``: as a sum of ``count`` random terms it is sqrt(count) large, and its error grows by
        as much. ``coarse``: statistics are rounded to the data's dtype.
        """
        eps = torch.finfo(getattr(torch, case.dtype)).eps
        sum_eps = torch.finfo(torch.float64 if case.dtype == "float64" else torch.float32).eps
        atol = max(8 * sqrt(case.count), 100) * sum_eps
        atol = max(eps, atol) if coarse else atol
        fused = bool(case.epilogue.act)
        return Bounds(fused * eps / 2, (1 + fused) * eps, atol, atol * sqrt(case.count))


@dataclass(frozen=True)
class Gradients:
    """Expected gradients, each with what rounding may add; (c, count) and (c, 1)."""

    values: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]


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

    def expected(self, actual: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each tensor's name, values and errors; ``actual`` says on which side of a kink its gradients are."""
        bounds, count = self._bounds, self._xhat.shape[1]
        yield "output", *self._activated(self._z, self._z_error)
        updates = {"running_mean": self._mean, "running_var": self._var * (count / (count - 1))}
        for name, update in updates.items():
            value = (1 - MOMENTUM) * self._t[name] + MOMENTUM * update
            yield name, value, value.abs() * bounds.rtol + bounds.atol
        xhat = (self._t["input"] - self._t["running_mean"]) * (self._t["running_var"] + EPS).rsqrt()
        yield "eval output", *self._activated(*self._preactivation(xhat))
        gradients = self._gradients(self._slopes(actual))
        for name, value in gradients.values.items():
            if name in actual:
                yield name, value, gradients.errors[name]

    def _slopes(self, actual: Mapping[str, Tensor]) -> Tensor:
        """The activation's derivative, at a kink that of the side on which ``actual`` is."""
        z, error = self._z, self._z_error
        near = torch.zeros_like(z, dtype=torch.bool)
        for kink in KINKS.get(self._act, ()):
            near |= (z - kink).abs() <= error
        slopes = slope(self._act, z)
        if not near.any():
            return slopes
        below, above = (slope(self._act, z[near] + side * error[near]) for side in (-2, 2))
        slopes[near] = below
        dy = self._t["grad_output"][near]
        if "grad_residual" in actual:
            given, low, high = actual["grad_residual"].double()[near], dy * below, dy * above
            slopes[near] = torch.where((given - high).abs() < (given - low).abs(), above, below)
            return slopes
        # What changing sides changes in an element's own gradient: its part in the channel's sums is small. Which the
        # others' sides are is in the sums, and known better the second time.
        scale = (self._t["weight"] * self._invstd).expand_as(z)[near]
        given = actual["grad_input"].double()[near]
        for _ in range(2):
            now = slopes[near]
            here = self._gradients(slopes).values["grad_input"][near]
            low, high = (here + scale * dy * (side - now) for side in (below, above))
            slopes[near] = torch.where((given - high).abs() < (given - low).abs(), above, below)
        return slopes

    def _gradients(self, slopes: Tensor) -> Gradients:
        """From the formula; the error of what comes to the batch norm's backward is carried through it."""
        bounds, xhat, count = self._bounds, self._xhat, self._xhat.shape[1]
        dy = self._t["grad_output"]
        dz = dy * slopes
        sum_dz, sum_dz_xhat = dz.sum(1, keepdim=True), (dz * xhat).sum(1, keepdim=True)
        scale = self._t["weight"] * self._invstd
        grad_input = scale * (dz - sum_dz / count - xhat * (sum_dz_xhat / count))
        curvature = CURVATURE.get(self._act, 0.0)
        dz_error = dz.new_zeros(1, 1)
        if curvature:  # otherwise slopes are 0 or 1, which round nothing; at a kink three errors may be between the two
            dz_error = dz.abs() * bounds.unit + dy.abs() * self._z_error * (3 * curvature)
        size = xhat.abs()
        sum_error = dz_error.sum(1, keepdim=True) + bounds.sum_atol
        sum_xhat_error = (dz_error * size).sum(1, keepdim=True) + bounds.sum_atol
        carried = scale.abs() * (dz_error + sum_error / count + size * (sum_xhat_error / count))
        return Gradients(
            {"grad_input": grad_input, "grad_weight": sum_dz_xhat, "grad_bias": sum_dz, "grad_residual": dz},
            {
                "grad_input": grad_input.abs() * bounds.rtol + bounds.atol + carried,
                "grad_weight": sum_dz_xhat.abs() * bounds.rtol + sum_xhat_error,
                "grad_bias": sum_dz.abs() * bounds.rtol + sum_error,
                "grad_residual": dz.abs() * bounds.rtol + dz_error,
            },
        )


class Checker:
    """Compares with float64, every element of the channels that it looks at."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        self._tensors = tensors
        self._device = tensors.input.device.type
        channels = spread(case.shape[1], max(2, CHECKED_ELEMENTS[self._device] // case.count))
        self._index = torch.tensor(channels, device=tensors.input.device)
        names = ("input", "weight", "bias", "running_mean", "running_var", "grad_output")
        given = {name: getattr(tensors, name) for name in names}
        given.update(zip(("residual",), tensors.residual, strict=False))
        self._given = {name: by_channel(tensor, self._index) for name, tensor in given.items()}
        # On a CPU torch.compile keeps mean and invstd from forward to backward in the data's dtype
        # (torch._decomp.decompositions.native_batch_norm_helper). That is how torch is.
        self._bounds, self._coarse = Bounds.of(case), Bounds.of(case, coarse=True)

    def check(self, provider: Provider) -> None:
        """Raise MismatchError at the first tensor that is not right."""
        with provider.context():
            actual = results(provider.function, self._tensors)
        where = f"{self._case}: {{}} of {provider.name}"
        for name in DATA:
            if name in actual:
                require_kind(where.format(name), actual[name], self._tensors.input)
        rows = {name: by_channel(tensor, self._index) for name, tensor in actual.items()}
        bounds = self._coarse if (provider.name, self._device) == (TORCH_COMPILE, "cpu") else self._bounds
        step = max(1, PIECE_ELEMENTS[self._device] // self._case.count)
        with set_torch_threads(1):  # a piece is too small for a second one
            for begin in range(0, len(self._index), step):
                piece = slice(begin, begin + step)
                some = {name: tensor[piece] for name, tensor in rows.items()}
                given = {name: tensor[piece] for name, tensor in self._given.items()}
                for name, value, error in Channels(self._case.epilogue.act, bounds, given).expected(some):
                    require_close(
                        f"{where.format(name)} is not float64's", some[name], value, error, self._index[piece]
                    )


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
