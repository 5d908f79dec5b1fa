"""Forwards that a trace by example would not tell the truth about: each computes what it did, for every argument, and
what dynamo can capture is fused."""

from __future__ import annotations

import collections
import copy
import gc
import logging
import random
import threading
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import Net, assert_fuses, assert_same_steps, count, fused_names, pair, sequential, small
from torch import Tensor, nn

import bnext

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
    from observe import step

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


class Fails(End):
    when = "never"

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.when == "before":
            raise LookupError("before")
        y = self.end(x)
        if self.when == "behind":
            raise LookupError("behind")
        return y


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first call", "later"])
def test_an_exception_of_the_forward_comes_out_once(first: bool, when: str) -> None:
    original, fused = pair(Fails)
    if not first:
        assert_same_steps(original, fused, X, modes=("training",))
    original.when = fused.when = when
    for _ in range(2):
        for model in (original, fused):
            with pytest.raises(LookupError, match=when):
                model(X)
    assert fused.calls == original.calls
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    original.when = fused.when = "never"
    assert_same_steps(original, fused, X, modes=("training",))
    assert_fuses(original, fused, X)


def test_errors_of_the_layers_are_torchs() -> None:
    original, fused = pair(End.of(lambda self, x: self.end(self.conv(x))))
    bnext.convert(original)  # which, unlike torch's layers, counts no batch that is refused
    for bad in (torch.randn(2, 4, 5, 5).double(), torch.randn(2, 3, 5, 5), torch.randn(3).double()):
        said = []
        for model in (original, fused):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                model(bad)
            said.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert said[1] == said[0]
    one = [torch.randn(1, 3, 1, 1).double()]
    for model in (original, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(*one)
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    assert_same_steps(original, fused, X, modes=("training",))
    assert_fuses(original, fused, X)


def test_a_model_that_cannot_be_captured_runs_unfused_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Uncapturable(End):
        @torch._dynamo.disable
        def forward(self, x: Tensor) -> Tensor:
            return self.end(x)

    original, fused = pair(Uncapturable)
    with caplog.at_level(logging.WARNING):
        assert_same_steps(original, fused, X)
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.name for r in said] == ["bnext"], [r.getMessage() for r in said]
    assert fused_names(fused) == []
    assert count(fused.train()(X)) == 1


def test_the_garbage_collector_is_no_part_of_a_forward() -> None:
    def callback(phase: str, info: dict[str, int]) -> None:
        with warnings.catch_warnings():
            pass

    gc.callbacks.append(callback)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        original, fused = pair(CountsInABuffer)
        assert_fuses(original, fused, X)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


def in_threads(calls: list[Any]) -> list[Any]:
    found: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("same", [True, False], ids=["one model", "copies"])
def test_first_calls_in_several_threads(same: bool) -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    original.eval()
    fused.eval()
    models = [fused] * 4 if same else [copy.deepcopy(fused) for _ in range(4)]
    inputs = [small() for _ in models]
    outputs = in_threads([lambda m=m, x=x: m(x) for m, x in zip(models, inputs, strict=True)])
    for output, x in zip(outputs, inputs, strict=True):
        assert isinstance(output, Tensor), output
        assert_close(output, original(x), "output")
    assert_fuses(original, fused, small())


def test_models_of_several_threads_are_reported_each_by_itself() -> None:
    models = [bnext.convert(sequential(act=act), fuse=True) for act in (nn.ReLU(), nn.SiLU(), nn.GELU())]
    x = torch.randn(2, 3, 4, 4)
    in_threads([lambda m=m: m(x) for m in models])
    whats = [[what for _, what in bnext.fusion_report(m).fused] for m in models]
    assert whats == [["batch norm -> relu"], ["batch norm -> silu"], ["batch norm -> gelu"]]
