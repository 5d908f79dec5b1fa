"""Whether a model's result is right: it may be about as far from a more precise one as torch's own eager one is."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Computations that round in different places are about as far from the truth as each other; of the few numbers of a
# loss curve or of a parameter's gradient one may be lucky.
FACTOR = 4

# Where a ReLU's argument, or the lead of a maximum, is within rounding of zero, two right computations take different
# sides, which shows more than all their rounding in float32: in the mean over ResNet-50's losses at batch 8 a 1e-5 was
# seen where it is otherwise 1e-7, and this leaves room for some more. In 16 bits torch has its share of them as well.
KINKS = 1e-4


class MismatchError(Exception):
    """A provider's result differs from the right one by more than rounding explains; the message is one line."""


def require_as_close(
    what: str, actual: Mapping[str, Tensor], torchs: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """Raise MismatchError, ``what`` with the tensor's name in its braces, at the first that is too far off.

    The error of a tensor is the mean over its elements, in sizes of their mean, so that what one of them does on the
    other side of a kink does not count alone. It is at most ``FACTOR`` times that of torch, or of a rounding of each
    element, or of a kink. NaN is close to nothing.
    """
    for name, expected in reference.items():
        tensor = actual[name]
        if tensor.shape != expected.shape:
            raise MismatchError(f"{what.format(name)}: shape {tuple(tensor.shape)}, not {tuple(expected.shape)}")
        limit = FACTOR * max(mean_error(torchs[name], expected), torch.finfo(tensor.dtype).eps, KINKS)
        error = mean_error(tensor, expected)
        if not error <= limit:
            raise MismatchError(f"{what.format(name)}: {error:.2g} of its size off, at most {limit:.2g} expected")


def mean_error(actual: Tensor, expected: Tensor) -> float:
    exact = expected.double()
    size = max(float(exact.abs().mean()), torch.finfo(torch.float64).tiny)
    return float((actual.double() - exact).abs().mean()) / size
