"""A walk over all batch norms of a model, one after the other, with all tensors alive, as in a training step.

So each finds its input in main memory, however small it is ("cold"). If the input is written right before, which is not
timed, it is in the caches as far as it fits ("hot").
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.correctness import Checker
from benchmarks.models import make_model
from benchmarks.operators import Provider, Tensors, floor_call, make_provider, make_tensors, provider_call
from benchmarks.suites import COPY, Case
from benchmarks.timing import Call, Stopwatch
from benchmarks.traffic import HOT_FORWARD, WALKS, Shape, model_bytes


def norm_shapes(case: Case) -> list[Shape]:
    """The shapes of the inputs of a model's batch norms, in the order of the calls."""
    shapes: list[Shape] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes.append(tuple(inputs[0].shape))

    model = make_model(case, "meta")
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(note)
    model(torch.empty(case.shape, device="meta"))
    return shapes


@dataclass(frozen=True)
class Walked:
    """A stopwatch of the calls. Each follows its preparation, which is not timed; results live to the end of a walk.

    The first walk is not timed: the system is still busy with the memory that another provider's walk has freed.
    """

    calls: Sequence[Call]
    prepare: Sequence[Callable[[], object]]

    def timeit(self, number: int) -> float:
        self._walk()
        return sum(self._walk() for _ in range(number))

    def _walk(self) -> float:
        seconds = 0.0
        results = []
        for prepare, call in zip(self.prepare, self.calls, strict=True):
            prepare()
            begin = time.perf_counter()
            results.append(call())
            seconds += time.perf_counter() - begin
        begin = time.perf_counter()
        results.clear()
        return seconds + time.perf_counter() - begin


class Walk:
    """What is measured of one model's batch norms, on the CPU."""

    floors = (COPY,)

    def __init__(self, case: Case) -> None:
        self._cases = [replace(case, shape=shape, model="") for shape in norm_shapes(case)]
        self._layers = [make_tensors(layer) for layer in self._cases]

    def make(self, provider: str) -> Provider:
        return make_provider(self._cases[0], provider)

    def check(self, provider: str, made: Any) -> None:
        """Raise MismatchError where the results of the first or the last layer are wrong."""
        for layer in (0, -1):
            Checker(self._cases[layer], self._layers[layer]).check(made)

    def stopwatch(self, mode: str, operation: str, made: Provider | None) -> tuple[Stopwatch, dict[str, Any]]:
        single = WALKS[operation]
        order = self._layers if single == "forward" else self._layers[::-1]
        calls = [floor_call(single, t) if made is None else provider_call(single, made.function, t) for t in order]
        prepare = [rewrite(t) if operation == HOT_FORWARD else nothing for t in order]
        moved = sum(model_bytes(single, case.shape, case.dtype) for case in self._cases)
        return Walked(calls, prepare), {"bytes": moved, "plan": ""}


def nothing() -> None:
    pass


def rewrite(tensors: Tensors) -> Call:
    """Write the input in memory order, as a preceding operator would."""
    return partial(tensors.input.detach().mul_, 1.0)
