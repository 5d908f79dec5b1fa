"""Forwards that a trace by example would not tell the truth about: each computes what it did, for every argument, and
what dynamo can capture is fused."""

from __future__ import annotations

import collections
import random
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import Net, assert_fuses, fused_names, pair, step
from torch import Tensor, nn

X, Y = (torch.linspace(-3, 2, 120, dtype=torch.float64).mul(k).sin().view(2, 3, 5, 4) for k in (3, 7))


class End(Net):
    def end(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class Default(End):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.end(x * scale)


class Starred(End):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.end(sum(xs))


class MaybeNone(End):
    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.end(x) if residual is None else F.relu(self.bn(x) + residual)


class MaybeList(End):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.end(torch.cat(x) if isinstance(x, list) else x)


class ByDtype(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * {torch.float64: 2.0}.get(x.dtype, 1.0))


class ByMode(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * 2 if self.training else x)


class ByModeOfALayer(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x + 1 if self.conv.training else x)


class ByGradMode(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * 2 if torch.is_grad_enabled() else x)


class WithBlock(End):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean((0, 2, 3), keepdim=True)
        return self.end(x * scale)


class SavedTensors(End):
    """Gradients differ without the block."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t.clone()):
            x = x.square()
        return self.end(x)


class SavedAround(End):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
            return self.end(x)


class Decorated(End):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


class Swallowed(End):
    def forward(self, x: Tensor) -> Tensor:
        try:
            scale = [2.0][int(x.shape[2] == 5)]
        except IndexError:
            scale = 4.0
        return self.end(x * scale)


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class OwnGradient(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(Flipped.apply(x))


class OwnGradientBetween(End):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(Flipped.apply(self.bn(x)))


class Remembers(End):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.end(x * len(self.seen))


class ChangesATensor(End):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros((), dtype=torch.float64)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return self.end(x * self.state.item())


class CountsInABuffer(End):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.end(x * self.calls)


class Constant(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * torch.full((3, 1, 1), 2.0, dtype=torch.float64))


class Draws(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * torch.rand(()).item())


class DrawsInPython(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * (0.5 + random.random()))


class Table(End):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return collections.OrderedDict(out=self.end(x), mean=x.mean())


class Out(NamedTuple):
    out: Tensor
    size: tuple[int, ...]
    parts: list[Tensor]


class Structured(End):
    def forward(self, x: Tensor) -> Out:
        y = self.end(x)
        return Out(y, tuple(y.shape), [y[:, 0], y[..., 1:]])


class SecondName(End):
    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        m = n
        m += 1
        return self.end(x * m) * n


class ByValue(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x if x.sum() > 0 else -x)


class ByValueBetween(End):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return F.relu(y) if y.sum() > x.sum() else F.silu(y)


class ItemBetween(End):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        m = y.max().item()
        return F.relu(y) * m


class Numpy(End):
    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().numpy().std())
        return self.end(x * scale)


class Generator(End):
    def layers(self) -> Any:
        yield self.conv
        yield self.bn
        yield self.relu

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


class Lists(End):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(self.conv, self.bn, self.silu), nn.ModuleDict({"a": self.bn2})])

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stages[0](x)
        return [first, F.relu(self.stages[1]["a"](first))]


FORWARDS: list[tuple[type[Net], list[tuple[Any, ...]], list[str]]] = [
    (Default, [(X,), (X, 3.0)], ["bn"]),
    (Starred, [(X,), (X, Y)], ["bn"]),
    (MaybeNone, [(X, Y), (X, None)], ["bn"]),
    (MaybeList, [(X,)], ["bn"]),
    (ByDtype, [(X,)], ["bn"]),
    (ByMode, [(X,)], ["bn"]),
    (ByModeOfALayer, [(X,)], ["bn"]),
    (ByGradMode, [(X,)], ["bn"]),
    (WithBlock, [(X,)], ["bn"]),
    (SavedTensors, [(X,)], []),
    (SavedAround, [(X,)], []),
    (Decorated, [(X,)], ["bn"]),
    (Swallowed, [(X,)], ["bn"]),
    (OwnGradient, [(X,)], ["bn"]),
    (OwnGradientBetween, [(X,)], []),
    (Remembers, [(X,)], ["bn"]),
    (ChangesATensor, [(X,)], []),
    (CountsInABuffer, [(X,)], ["bn"]),
    (Constant, [(X,)], ["bn"]),
    (Draws, [(X,)], []),
    (DrawsInPython, [(X,)], []),
    (Table, [(X,)], ["bn"]),
    (Structured, [(X,)], ["bn"]),
    (SecondName, [(X,)], ["bn"]),
    (ByValue, [(X,), (-X,)], ["bn"]),
    (ByValueBetween, [(X,), (-X,)], []),
    (ItemBetween, [(X,)], []),
    (Numpy, [(X,)], []),
    (Generator, [(X,)], ["bn"]),
    (Lists, [(X,)], ["bn2"]),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of dynamo, about what it does not capture
@pytest.mark.parametrize(("cls", "inputs", "names"), FORWARDS, ids=[case[0].__name__ for case in FORWARDS])
def test_a_forward_computes_what_it_did(cls: type[Net], inputs: list[tuple[Any, ...]], names: list[str]) -> None:
    original, fused = pair(cls)
    for given in inputs:
        for mode in ("training", "evaluation, no_grad"):
            for _ in range(2):
                for model in (original, fused):
                    random.seed(5)
                    model.last = run(model, given, mode)
                assert type(fused.last[0]) is type(original.last[0])
                assert_close(tuple(fused.last), tuple(original.last), mode)
    assert set(names) <= set(fused_names(fused))


def run(model: nn.Module, inputs: tuple[Any, ...], mode: str) -> list[Any]:
    found = step(model, inputs, mode)
    return [found["output"], found.get("gradients"), found.get("parameters"), found["buffers"]]


def test_keyword_arguments() -> None:
    original, fused = pair(Default)
    for given in ({"x": X}, {"x": X, "scale": 2.0}, {"scale": 3.0, "x": Y}):
        assert_close(fused(**given), original(**given), "output")
    for model in (original, fused):
        with pytest.raises(TypeError, match="unexpected keyword"):
            model(X, other=1)
    assert_fuses(original, fused, X)
