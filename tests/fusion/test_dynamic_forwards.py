"""Forwards that depend on arguments, modes, values, state or random numbers, so that one trace would not do for all
calls: each computes the same as unfused, and what dynamo can capture is fused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import QUICK, Net, assert_fuses, fused_names, pair, step
from torch import Tensor

X, Y = (torch.linspace(-3, 2, 120, dtype=torch.float64).mul(k).sin().view(2, 3, 5, 4) for k in (3, 7))


class End(Net):
    """Layers, buffers and attributes for the forwards to read or to change."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.tensor = torch.zeros((), dtype=torch.float64)  # neither parameter nor buffer
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def end(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class Case(NamedTuple):
    forward: Callable[..., Any]
    fused: str | None = "bn"  # the name of a batch norm that is fused; None: not tested
    inputs: tuple[tuple[Any, ...], ...] = ((X,),)


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Out(NamedTuple):
    out: Tensor
    size: tuple[int, ...]
    parts: list[Tensor]


def saved_tensors(self: End, x: Tensor) -> Tensor:
    """The hooks, which double what is saved, change the gradients."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t.clone()):
        x = x.square()
    return self.end(x)


def saved_around(self: End, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        return self.end(x)


def remembers(self: End, x: Tensor) -> Tensor:
    self.seen.append(1)
    return self.end(x * len(self.seen))


CASES = {
    "an argument with a default": Case(lambda self, x, scale=1.0: self.end(x * scale), inputs=((X,), (X, 3.0))),
    "arguments with a star": Case(lambda self, *xs: self.end(sum(xs)), inputs=((X,), (X, Y))),
    "perhaps None": Case(
        lambda self, x, r: self.end(x) if r is None else F.relu(self.bn(x) + r), inputs=((X, Y), (X, None))
    ),
    "by mode": Case(lambda self, x: self.end(x * 2 if self.training else x)),
    "by the mode of a layer": Case(lambda self, x: self.end(x + 1 if self.conv.training else x)),
    "by grad mode": Case(lambda self, x: self.end(x * 2 if torch.is_grad_enabled() else x)),
    "by value": Case(lambda self, x: self.end(x if x.sum() > 0 else -x), inputs=((X,), (-X,))),
    "by value, between": Case(
        lambda self, x: F.relu(y) if (y := self.bn(x)).sum() > x.sum() else F.silu(y), None, ((X,), (-X,))
    ),
    "an item of the output, between": Case(lambda self, x: (y := self.bn(x)).max().item() * F.relu(y), None),
    "saved tensors": Case(saved_tensors, None),
    "saved tensors, around": Case(saved_around, None),
    "decorated": Case(torch.no_grad()(lambda self, x: self.end(x))),
    "a gradient of its own": Case(lambda self, x: self.end(Flipped.apply(x))),
    "a gradient of its own, between": Case(lambda self, x: F.relu(Flipped.apply(self.bn(x))), None),
    "a list that grows": Case(remembers),
    "a tensor that changes": Case(lambda self, x: self.end(x * self.tensor.add_(1).item()), None),
    "a buffer that counts": Case(lambda self, x: self.end(x * self.calls.add_(1))),
    "a random number": Case(lambda self, x: self.end(x * torch.rand(()).item()), None),
    "a random number of Python's": Case(lambda self, x: self.end(x * (0.5 + random.random())), None),
    "numpy": Case(lambda self, x: self.end(x * float(x.detach().numpy().std())), None),
    "returns a named tuple": Case(lambda self, x: Out(y := self.end(x), tuple(y.shape), [y[:, 0], y[..., 1:]])),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo warns about what it does not capture
@pytest.mark.parametrize("name", CASES)
def test_a_forward_computes_the_same(name: str) -> None:
    forward, norm, inputs = CASES[name]
    original, fused = pair(End.with_forward(forward))
    for given in inputs:
        for mode in QUICK * 2:
            steps = []
            for model in (original, fused):
                random.seed(5)
                steps.append(step(model, given, mode))
            assert_close(steps[1], steps[0], mode)
    assert norm is None or norm in fused_names(fused)


def test_keyword_arguments() -> None:
    original, fused = pair(End.with_forward(CASES["an argument with a default"].forward))
    for given in ({"x": X}, {"x": X, "scale": 2.0}, {"scale": 3.0, "x": Y}):
        assert_close(fused(**given), original(**given), "output")
    for model in (original, fused):
        with pytest.raises(TypeError, match="unexpected keyword"):
            model(X, other=1)
    assert_fuses(original, fused, X)
