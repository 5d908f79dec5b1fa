"""Correctness before timing: every provider has to agree with torch on a case before it gets a number."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor
from torch.utils.benchmark.utils.common import set_torch_threads

from benchmarks.operations import PROVIDERS, REFERENCE, BatchNorm, Tensors, backward, evaluate, forward
from benchmarks.suites import Case

SMALL_NUMEL = 100_000  # compared in one piece: more pieces would only be more calls


class MismatchError(Exception):
    """A provider's result differs from torch's by more than rounding explains."""


def results(function: BatchNorm, tensors: Tensors) -> dict[str, Tensor]:
    """Everything a training call, its backward and an inference call return or update."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    output = forward(function, tensors, running_mean, running_var)
    grad_input, grad_weight, grad_bias = backward(output, tensors)
    return {
        "output": output.detach(),
        "running_mean": running_mean,
        "running_var": running_var,
        "grad_input": grad_input,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
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


def check_case(case: Case, tensors: Tensors) -> None:
    """Raise MismatchError, naming case, provider and tensor, where a provider differs from torch."""
    bounds = tolerances(case)
    expected = results(PROVIDERS[REFERENCE], tensors)
    for provider, function in PROVIDERS.items():
        if provider == REFERENCE:
            continue
        compare_results(f"{case}: {{}} of {provider} is not torch's", results(function, tensors), expected, bounds)


def compare_results(
    message: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bounds: Mapping[str, float]
) -> None:
    """Raise MismatchError, the message with the tensor's name in its braces, at the first tensor that differs."""
    for name, tensor in actual.items():
        atol = bounds["sum_atol" if name in ("grad_weight", "grad_bias") else "atol"]
        difference = describe_difference(tensor, expected[name], bounds["rtol"], atol)
        if difference:
            raise MismatchError(f"{message.format(name)}: {difference}")


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
