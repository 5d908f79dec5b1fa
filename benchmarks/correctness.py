"""Whether a result is right: its error against a more precise one may be about as large as that of eager torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.operators import BatchNorm, Provider, Tensors, eager, forward, results
from benchmarks.suites import BY_HAND, Case
from benchmarks.traffic import Epilogue

# Computations that round in different places have errors of about the same size. But a loss curve or a parameter's
# gradient has few numbers, whose errors may be small by chance.
FACTOR = 4

# Where a ReLU's argument, or the difference of two candidates for a maximum, is within rounding of zero, two right
# computations may take different branches. In float32 this shows more than all rounding: the mean over ResNet-50's
# losses at batch 8 differed by 1e-5 where it otherwise differs by 1e-7, and the tolerance allows for some more. In 16
# bits torch's results differ as much. Sums of a million elements in plain float32, in different orders, may also differ
# by this much.
TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-11

# Of larger tensors only as many channels are checked as have so many elements: in float64 they take a CPU a quarter of
# a second.
CHECKED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

# The results that have the data's size.
DATA = ("output", "eval output", "grad_input", "grad_residual")

# Where an activation's derivative jumps. A pre-activation that is closer to such a kink than KINK may be on either side
# of it after rounding, with another gradient. bfloat16 rounds numbers below 4 by 2^-7.
KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}
KINK = 2.0**-5


class MismatchError(Exception):
    """A provider's result differs from the right one by more than rounding explains; the message has one line."""


def require_as_close(
    what: str,
    actual: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    reduce: Callable[[Tensor], Tensor],
    least: float = 0.0,
) -> None:
    """Raise MismatchError at the first tensor that is too far off; its message is ``what``, formatted with the tensor's
    name.

    The error of a tensor is the largest of its elements (``torch.amax``), or their mean (``torch.mean``) where a single
    element on the other side of a kink must not decide, relative to the mean size of the elements. It may be at most
    ``FACTOR`` times that of torch, or of a rounding of each element, or ``TOLERANCE``, and in any case ``least``. NaN
    is never close.
    """
    for name, expected in reference.items():
        tensor, exact = actual[name], expected.double()
        if tensor.shape != expected.shape:
            raise MismatchError(f"{what.format(name)}: shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        size = max(float(exact.abs().mean()), torch.finfo(torch.float64).tiny)
        error, torchs_error = (float(reduce((t.double() - exact).abs())) / size for t in (tensor, torchs[name]))
        tolerance = FLOAT64_TOLERANCE if tensor.dtype == torch.float64 else TOLERANCE
        limit = max(FACTOR * max(torchs_error, torch.finfo(tensor.dtype).eps, tolerance), least)
        if not error <= limit:
            raise MismatchError(f"{what.format(name)}: {error:.2g} of its size off, at most {limit:.2g} expected")


def away_from_kinks(epilogue: Epilogue, tensors: Tensors) -> Tensors:
    """The arguments with a grad_output that is 0 near a kink, so that elements there do not contribute."""
    if epilogue.act not in KINKS:
        return tensors
    statistics = tensors.running_mean.clone(), tensors.running_var.clone()
    with torch.no_grad():
        z = forward(eager(Epilogue(residual=epilogue.residual)), tensors, *statistics)
    near = torch.stack([(z - kink).abs() < KINK for kink in KINKS[epilogue.act]]).any(0)
    return replace(tensors, grad_output=tensors.grad_output.clone().masked_fill_(near, 0))


class Checker:
    """Compares batch norms with float64, in the first channel, the last, and others evenly between them.

    ``right``: the function that is computed in float64, and by torch for comparison; None: torch's operators.
    """

    def __init__(self, case: Case, tensors: Tensors, right: BatchNorm | None = None) -> None:
        self._case = case
        self._tensors = away_from_kinks(case.epilogue, tensors)
        channels = case.shape[1]
        number = min(channels, max(2, CHECKED_ELEMENTS[tensors.input.device.type] // case.count))
        chosen = torch.linspace(0, channels - 1, number).round().long()
        self._index = chosen.to(tensors.input.device)
        some = self._tensors.mapped(lambda tensor: self._some(tensor).requires_grad_(tensor.requires_grad))
        precise = some.mapped(lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))
        self._reference, self._torchs = (results(right or eager(case.epilogue), given) for given in (precise, some))

    def _some(self, tensor: Tensor) -> Tensor:
        """The channels of data or of a parameter that are checked."""
        return tensor.detach().index_select(min(tensor.dim() - 1, 1), self._index)

    def check(self, provider: Provider) -> None:
        """Raise MismatchError at the first tensor that is not right."""
        with provider.context():
            actual = results(provider.function, self._tensors)
        where = f"{self._case}: {{}} of {provider.name}"
        for name in DATA:
            # Implementations by hand may return gradients in another layout.
            if name in actual and not provider.name.endswith(BY_HAND):
                require_kind(where.format(name), actual[name], self._tensors.input)
        found = {name: self._some(tensor) for name, tensor in actual.items()}
        require_as_close(where, found, self._torchs, self._reference, torch.amax)


def require_kind(what: str, actual: Tensor, input: Tensor) -> None:
    """Raise MismatchError unless results of the data's size have the input's dtype, shape and layout."""
    for name in ("dtype", "shape"):
        if getattr(actual, name) != getattr(input, name):
            raise MismatchError(f"{what} has {name} {getattr(actual, name)}, not {getattr(input, name)}")
    if actual.stride() != input.stride():
        raise MismatchError(f"{what} has strides {actual.stride()}, not {input.stride()}")
