"""Correctness before timing, on a GPU: against torch everywhere, and against float64 on a few channels."""

import torch
from torch import Tensor

from benchmarks.check import compare_results, results, spread, tolerances
from benchmarks.operations import Tensors
from benchmarks.providers import PROVIDERS, REFERENCE, Provider
from benchmarks.suites import Case

CHANNELS = 8
REFERENCE_ELEMENTS = 2**25  # of which float64, gradients and temporaries make a gigabyte or two


def some_channels(case: Case) -> list[int]:
    """A few channels: the first, the last, others evenly between them; fewer where they are very long."""
    return spread(case.shape[1], max(1, min(CHANNELS, REFERENCE_ELEMENTS // case.count)))


def take(tensor: Tensor, channels: list[int]) -> Tensor:
    """Those channels of a tensor of the data's shape or of length C, in float64, contiguous."""
    index = torch.tensor(channels, device=tensor.device)
    return tensor.detach().index_select(min(tensor.dim() - 1, 1), index).double().contiguous()


def reference(tensors: Tensors, channels: list[int]) -> dict[str, Tensor]:
    """What the channels should give: torch's own function in float64, on the values that all are given."""
    few = tensors.mapped(lambda tensor: take(tensor, channels))
    for leaf in few.leaves:
        leaf.requires_grad_()
    return results(torch.nn.functional.batch_norm, few)


class CudaChecker:
    """The expected results of one case, for any number of providers."""

    def __init__(self, case: Case, tensors: Tensors) -> None:
        self._case = case
        self._tensors = tensors
        self._torch = results(PROVIDERS[REFERENCE], tensors)
        self._channels = some_channels(case)
        self._float64 = reference(tensors, self._channels)

    def check(self, provider: Provider) -> None:
        """Raise MismatchError where a result is not torch's, or further from float64 than rounding explains.

        Only one of the two sides has rounded its result when the other is float64: half the relative tolerance.
        """
        with provider.context():
            actual = results(provider.function, self._tensors)
        bounds = tolerances(self._case)
        where = f"{self._case}: {{}} of {provider.name}"
        compare_results(f"{where} is not torch's", actual, self._torch, bounds)
        few = {name: take(tensor, self._channels) for name, tensor in actual.items()}
        compare_results(f"{where} is not float64's", few, self._float64, {**bounds, "rtol": bounds["rtol"] / 2})
