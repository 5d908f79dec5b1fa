"""Whether a result is right: it may be about as far from a more precise one as torch's own eager one is."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.operators import Provider, Tensors, eager, results
from benchmarks.suites import Case

# Computations that round in different places are about as far from the truth as each other; of the few numbers of a
# loss curve or of a parameter's gradient one may be lucky.
FACTOR = 4

# Where a ReLU's argument, or the lead of a maximum, is within rounding of zero, two right computations take different
# sides, which shows more than all their rounding in float32: in the mean over ResNet-50's losses at batch 8 a 1e-5 was
# seen where it is otherwise 1e-7, and this leaves room for some more. In 16 bits torch has its share of them as well.
KINKS = 1e-4

# Of larger tensors as many channels as have so many elements: float64 takes a CPU a quarter of a second for them.
CHECKED_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

# Of the data's size. Outputs have no kinks: what one element does counts alone.
OUTPUTS = ("output", "eval output")
DATA = (*OUTPUTS, "grad_input", "grad_residual")


class MismatchError(Exception):
    """A provider's result differs from the right one by more than rounding explains; the message is one line."""


def mean_error(actual: Tensor, expected: Tensor) -> float:
    return error_of(actual, expected, torch.mean)


def worst_error(actual: Tensor, expected: Tensor) -> float:
    return error_of(actual, expected, torch.amax)


def error_of(actual: Tensor, expected: Tensor, reduce: Callable[[Tensor], Tensor]) -> float:
    """In sizes of the elements' mean. NaN is close to nothing."""
    exact = expected.double()
    size = max(float(exact.abs().mean()), torch.finfo(torch.float64).tiny)
    return float(reduce((actual.double() - exact).abs())) / size


def require_as_close(
    what: str,
    actual: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    error_of: Callable[[Tensor, Tensor], float] = mean_error,
) -> None:
    """Raise MismatchError, ``what`` with the tensor's name in its braces, at the first that is too far off.

    The error of a tensor is the mean over its elements, so that what one of them does on the other side of a kink does
    not count alone. It is at most ``FACTOR`` times that of torch, or of a rounding of each element, or of a kink.
    """
    for name, expected in reference.items():
        tensor = actual[name]
        if tensor.shape != expected.shape:
            raise MismatchError(f"{what.format(name)}: shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        limit = FACTOR * max(error_of(torchs[name], expected), torch.finfo(tensor.dtype).eps, KINKS)
        error = error_of(tensor, expected)
        if not error <= limit:
            raise MismatchError(f"{what.format(name)}: {error:.2g} of its size off, at most {limit:.2g} expected")


class Checker:
    """Compares batch norms with float64, in the first channel, the last, and others evenly between them."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        self._tensors = tensors
        channels = case.shape[1]
        number = min(channels, max(2, CHECKED_ELEMENTS[tensors.input.device.type] // case.count))
        chosen = torch.linspace(0, channels - 1, number).round().long()
        self._index = chosen.to(tensors.input.device)
        some = tensors.mapped(lambda tensor: self._some(tensor).requires_grad_(tensor.requires_grad))
        precise = some.mapped(lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))
        self._reference, self._torchs = (results(eager(case.epilogue), given) for given in (precise, some))

    def _some(self, tensor: Tensor) -> Tensor:
        """The channels that are looked at, of data or of a parameter."""
        return tensor.detach().index_select(min(tensor.dim() - 1, 1), self._index)

    def check(self, provider: Provider) -> None:
        """Raise MismatchError at the first tensor that is not right."""
        with provider.context():
            actual = results(provider.function, self._tensors)
        where = f"{self._case}: {{}} of {provider.name}"
        for name in DATA:
            if name in actual:
                require_kind(where.format(name), actual[name], self._tensors.input)
        found = {name: self._some(tensor) for name, tensor in actual.items()}
        outputs = {name: self._reference[name] for name in OUTPUTS}
        require_as_close(where, found, self._torchs, outputs, worst_error)
        require_as_close(where, found, self._torchs, self._reference)


def require_kind(what: str, actual: Tensor, input: Tensor) -> None:
    """Results of the data's size have the input's dtype, shape and layout."""
    for name in ("dtype", "shape"):
        if getattr(actual, name) != getattr(input, name):
            raise MismatchError(f"{what} has {name} {getattr(actual, name)}, not {getattr(input, name)}")
    if actual.stride() != input.stride():
        raise MismatchError(f"{what} has strides {actual.stride()}, not {input.stride()}")
