"""Correctness before timing: every provider has to agree with torch on a case before it gets a number."""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.operations import BatchNorm, Tensors, backward, evaluate, forward
from benchmarks.providers import PROVIDERS, REFERENCE, Provider
from benchmarks.report import NO_CUDNN
from benchmarks.suites import Case

GRADIENTS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")  # the last where there is a residual

SMALL_NUMEL = 100_000  # compared in one piece: more pieces would only be more calls


class MismatchError(Exception):
    """A provider's result differs from torch's by more than rounding explains."""


def results(function: BatchNorm, tensors: Tensors) -> dict[str, Tensor]:
    """Everything a training call, its backward and an inference call return or update."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    output = forward(function, tensors, running_mean, running_var)
    gradients = backward(output, tensors)
    return {
        "output": output.detach(),
        "running_mean": running_mean,
        "running_var": running_var,
        **dict(zip(GRADIENTS, gradients, strict=False)),
        "eval output": evaluate(function, tensors.detached()),
    }


def tolerances(case: Case) -> dict[str, float]:
    """rtol of a data tensor, atol of values of size one, and atol of a sum over a channel.

    Both sides round a result once: half an ulp each. Their statistics are sums of ``count`` terms; the error
    of such a sum in plain float32, which torch's channels_last path uses, grows as sqrt(count) units of
    rounding, with 8 for the tail over all channels. A gradient of a parameter is not divided by ``count``: as
    a sum of ``count`` random terms it is sqrt(count) large, and its error grows by as much.
    """
    unit = torch.finfo(torch.float64 if case.dtype == "float64" else torch.float32).eps
    mean_atol = max(8 * sqrt(case.count), 100) * unit
    return {
        "rtol": 2 * torch.finfo(getattr(torch, case.dtype)).eps,
        "atol": mean_atol,
        "sum_atol": mean_atol * sqrt(case.count),
    }


class Checker(Protocol):
    """Knows the right results of one case."""

    def check(self, provider: Provider) -> None:
        """Raise MismatchError, naming case, provider and tensor, where a result is not right."""


class TorchChecker:
    """Compares with torch's own function."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        self._tensors = tensors
        self._expected = results(PROVIDERS[REFERENCE], tensors)

    def check(self, provider: Provider) -> None:
        if provider.name == REFERENCE:
            return
        with provider.context():
            actual = results(provider.function, self._tensors)
        message = f"{self._case}: {{}} of {provider.name} is not torch's"
        compare_results(message, actual, self._expected, tolerances(self._case))


def checked_providers(
    case: Case,
    makers: Mapping[str, Callable[[], Provider]],
    checker: Checker,
    report: Callable[[str, bool], None],
) -> list[Provider]:
    """The providers to be timed on a case: none where bnext is wrong, or bnext or torch fails.

    torch's own functions are timed even where they are further from right: that is how torch is. ``report`` is told
    each failure, and whether it is one of a provider that is required, as opposed to one that is left out.
    """
    checked = []
    for name, make in makers.items():
        required = name in PROVIDERS
        try:
            provider = make()
            checker.check(provider)
        except MismatchError as error:
            as_it_is = name in (REFERENCE, NO_CUDNN)
            report(str(error), required and not as_it_is)
            if as_it_is:
                checked.append(provider)
            elif required:
                return []
        except Exception as error:  # no memory, or whatever torch or a compiler raises: others may be fine
            report(f"{case}: {name} failed: {summary(error)}", required)
            if required:
                return []
        else:
            checked.append(provider)
    return checked


def summary(error: BaseException) -> str:
    """The error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")


def compare_results(
    message: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Mapping[str, float]
) -> None:
    """Raise MismatchError, the message with the tensor's name in its braces, at the first tensor that differs."""
    for name, tensor in actual.items():
        atol = bounds["sum_atol" if name in ("grad_weight", "grad_bias") else "atol"]
        difference = describe_difference(tensor, expected[name], bounds["rtol"], atol)
        if difference:
            raise MismatchError(f"{message.format(name)}: {difference}")


def spread(channels: int, number: int) -> list[int]:
    """So many channels, or all: the first, the last, others evenly between them."""
    number = min(number, channels)
    return sorted({index * (channels - 1) // max(number - 1, 1) for index in range(number)})


def is_close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    """torch.allclose without its temporaries of the whole size, which would take longer than the timing.

    Pieces that fit the cache are too small to be worth a second thread. NaN is close to nothing.
    """
    pieces = 32 if actual.numel() > SMALL_NUMEL else 1
    with set_torch_threads(1):
        for a, e in zip(actual.chunk(pieces), expected.chunk(pieces), strict=True):
            excess = (a - e).abs_().sub_(e.abs().mul_(rtol))
            if not excess.amax() <= atol:
                return False
    return True


def describe_difference(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> str | None:
    """How two tensors differ in shape, dtype, strides or values, in one line; None where they agree."""
    same_kind = (actual.dtype, actual.shape, actual.stride()) == (
        expected.dtype,
        expected.shape,
        expected.stride(),
    )
    if same_kind and is_close(actual, expected, rtol, atol):
        return None
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_stride=True)
    except AssertionError as error:
        return " ".join(str(error).split())
    return None
