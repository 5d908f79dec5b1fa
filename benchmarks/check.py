"""Correctness before timing: every provider has to be right on a case before it gets a number."""

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from benchmarks.command import error_summary
from benchmarks.operations import BatchNorm, Tensors, backward, evaluate, forward
from benchmarks.providers import PROVIDERS, Provider
from benchmarks.suites import NO_CUDNN, TORCH, Case

GRADIENTS = ("grad_input", "grad_weight", "grad_bias", "grad_residual")  # the last where there is a residual


class MismatchError(Exception):
    """A provider's result differs from the right one by more than rounding explains."""


class CaseChecker(Protocol):
    """Knows the right results of one case."""

    def check(self, provider: Provider) -> None:
        """Raise MismatchError, naming case, provider and tensor, where a result is not right."""


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


def checked_providers(
    case: Case,
    makers: Mapping[str, Callable[[], Provider]],
    checker: CaseChecker,
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
            as_it_is = name in (TORCH, NO_CUDNN)
            report(str(error), required and not as_it_is)
            if as_it_is:
                checked.append(provider)
            elif required:
                return []
        except Exception as error:  # no memory, or whatever torch or a compiler raises: others may be fine
            report(f"{case}: {name} failed: {error_summary(error)}", required)
            if required:
                return []
        else:
            checked.append(provider)
    return checked
