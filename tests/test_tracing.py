"""Forwards that a trace would not tell the truth about: each is left, and computes what it did."""

from __future__ import annotations

import collections
import copy
import gc
import random
import warnings

import networks
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import Small, assert_close, assert_same, fuse, pair, random_input
from torch import Tensor, nn

import bnext

X, Y = random_input(), random_input()


# Each forward ends with relu(bn(x)), which would be fused if it were traced.


class End(Small):
    def end(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


class Default(End):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.end(x * scale)


class Starred(End):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.end(sum(xs))


class KeywordOnly(End):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return self.end(x * scale)


class MaybeNone(End):
    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.end(x) if residual is None else self.end(x) + residual


class MaybeNoneInAHelper(End):
    def add(self, x: Tensor, other: Tensor | None) -> Tensor:
        return x if other is None else x + other

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self.end(self.add(x, residual))


class MaybeList(End):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.end(torch.cat(x) if isinstance(x, list) else x)


class MaybeListByType(End):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.end(torch.cat(x) if type(x) is list else x)


class MaybeAttribute(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * 2 if hasattr(x, "no_such_attribute") else x)


class ByDtypeName(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * 2 if f"{x.dtype}" == "torch.float64" else x)


class ByDtypeTable(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * {torch.float64: 2.0}.get(x.dtype, 1.0))


class ByMode(End):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return self.end(x)


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


def double(saved: Tensor) -> Tensor:
    return saved * 2


class WithHooks(End):
    """Gradients differ without the block."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(double, torch.clone):
            x = x.square()
        return self.end(x)


class SwitchesGradients(End):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        scale = x.abs().mean((0, 2, 3), keepdim=True)
        torch.set_grad_enabled(True)
        return self.end(x * scale)


class Decorated(End):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


class DecoratedHelper(End):
    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        return x.abs().mean((0, 2, 3), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * self.scale(x))


class Swallowed(End):
    def forward(self, x: Tensor) -> Tensor:
        try:
            scale = 2.0 if x.sum() > 0 else 3.0
        except ValueError:
            scale = 4.0
        return self.end(x * scale)


class Flipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return -grad


class OwnGradient(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(Flipped.apply(x))


class Counts(End):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.end(x * self.calls)


class Remembers(End):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return self.end(x * len(self.seen))


class Meter:
    total = 0

    def add(self) -> int:
        self.total += 1
        return self.total


METER = Meter()


class CountsElsewhere(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * (METER.add() % 2 + 1))


class ChangesATensor(End):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros((), dtype=torch.float64)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(1)
        return self.end(x * self.state.item())


class Constant(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * torch.full((3, 1, 1), 2.0, dtype=torch.float64))


class Draws(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * torch.rand(()).item())


class DrawsInPython(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x * random.random())


class Prints(End):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return self.end(x)


class Table(End):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return collections.OrderedDict(out=self.end(x))


class SecondName(End):
    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        m = n
        m += 1
        return self.end(x * m) * n


class OfTheInstance(End):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.other

    def other(self, x: Tensor) -> Tensor:
        return self.end(x) * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


class OwnPickle(End):
    def __reduce__(self) -> tuple[object, ...]:
        return OwnPickle, ()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


class Registers(End):
    known: list[type]

    def __init_subclass__(cls) -> None:
        raise AssertionError("made a subclass")

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x)


class ByValue(End):
    def forward(self, x: Tensor) -> Tensor:
        return self.end(x if x.sum() > 0 else -x)


REFUSED: list[tuple[type[nn.Module], str, list[tuple[object, ...]]]] = [
    (Default, "default", [(X,), (X, 3.0)]),
    (Starred, "*args", [(X,), (X, Y)]),
    (KeywordOnly, "keyword-only", []),
    (MaybeNone, "is None", [(X, Y), (X, None)]),
    (MaybeNoneInAHelper, "is None", [(X, Y), (X, None)]),
    (MaybeList, "type of a value", [(X,), ([X, Y],)]),
    (MaybeListByType, "type() of a value|which object", [(X,), ([X, Y],)]),
    (MaybeAttribute, "hasattr()", [(X,)]),
    (ByDtypeName, "string", [(X,)]),
    (ByDtypeTable, "table", [(X,)]),
    (ByMode, "training than in evaluation", [(X,)]),
    (ByModeOfALayer, "mode of its submodules", [(X,)]),
    (ByGradMode, "without gradients|gradients are wanted", [(X,)]),
    (WithBlock, "mode on the way|with block", [(X,)]),
    (WithHooks, "with block", [(X,)]),
    (SwitchesGradients, "mode on the way", [(X,)]),
    (Decorated, "plain function", [(X,)]),
    (DecoratedHelper, "mode on the way|decorated", [(X,)]),
    (Swallowed, "catches exceptions", [(X,), (-X,)]),
    (OwnGradient, "type of a value", [(X,)]),
    (Counts, "holds|outlives", [(X,)]),
    (Remembers, "holds|outlives", [(X,)]),
    (CountsElsewhere, "outlives", [(X,)]),
    (ChangesATensor, "holds", [(X,)]),
    (Constant, "neither a parameter nor a buffer", [(X,)]),
    (Draws, "random numbers", [(X,)]),
    (DrawsInPython, "random numbers|no source", [(X,)]),
    (Prints, "prints", [(X,)]),
    (Table, "OrderedDict", [(X,)]),
    (SecondName, "another name", [(X,)]),
    (OfTheInstance, "instance", [(X,)]),
    (OwnPickle, "pickle", [(X,)]),
    (Registers, "watches its subclasses", [(X,)]),
    (ByValue, "control flow", [(X,), (-X,)]),
]


@pytest.mark.parametrize(("cls", "reason", "inputs"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_forward_that_a_trace_would_not_tell_is_left(
    cls: type[nn.Module], reason: str, inputs: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = cls().double()
    if cls is OfTheInstance:
        original = cls().double()  # deepcopy would share the bound method
        original.load_state_dict(model.state_dict())
    elif cls is OwnPickle:
        original = model
    else:
        original = copy.deepcopy(model)
    held = {key: copy.copy(v) for key, v in model.__dict__.items() if key != "forward"}
    generators = random.getstate(), torch.get_rng_state()
    report = fuse(model)
    assert capsys.readouterr().out == ""
    assert {key: v for key, v in model.__dict__.items() if key != "forward"} == held
    assert random.getstate() == generators[0]
    assert torch.equal(torch.get_rng_state(), generators[1])
    assert report.fused == []
    (left,) = report.left
    assert left[0] == "(the module itself)"
    assert any(part in left[1] for part in reason.split("|")), left
    assert type(model) is cls
    if original is model:
        return
    METER.total = 0
    for values in inputs:
        if cls is MaybeList or cls is MaybeListByType or None in values or cls is Decorated or cls is Table:
            with torch.no_grad():
                assert_close(model(*values), original(*values), "output")
        elif cls is not CountsElsewhere:
            assert_same(original, model, *values)


class FollowsTheFlag(End):
    """Constants that are the training flag stay it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.bn(x)), 0.5, self.training)


class CountsInABuffer(End):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return F.relu(self.bn(x * self.calls))


class ChangesInPlace(End):
    """``y += 1`` changes ``z``, too."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        z = y[:, :2]
        y += 1
        return F.relu(self.bn(y)) * z.sum()


class Structured(End):
    def forward(self, x: Tensor) -> dict[str, object]:
        n, c, h, w = x.size()
        flat = F.relu(self.bn(x)).view(n, c, h * w)
        return {"flat": flat, "parts": [flat[:, 0], (n, flat[..., 1:])]}


@pytest.mark.parametrize("cls", [FollowsTheFlag, CountsInABuffer, ChangesInPlace, Structured])
def test_what_a_trace_does_tell_is_fused(cls: type[nn.Module]) -> None:
    original, fused, report = pair(cls)
    assert [what for _, what in report.fused] == ["bn -> relu"], report
    if cls is CountsInABuffer:
        assert int(fused.calls) == 0
    assert_same(original, fused, X)


def test_a_failing_trace_leaves_the_flags_of_every_layer() -> None:
    model = networks.Branching()
    model.bn.eval()
    model.body.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    bnext.convert(model, fuse=True)
    assert [m.training for m in model.modules()] == flags


def test_the_garbage_collector_is_no_part_of_a_forward() -> None:
    """hypothesis, for one, has a callback that a trace would refuse."""

    def callback(phase: str, info: dict[str, int]) -> None:
        with warnings.catch_warnings():
            pass

    gc.callbacks.append(callback)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        _, _, report = pair(FollowsTheFlag)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)
    assert report.fused == [("bn", "bn -> relu")]
    assert gc.isenabled()
