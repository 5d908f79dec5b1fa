"""What is recognised as BN → act and BN → add → act, and what is left because fusing it would be wrong."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from operator import methodcaller

import networks
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic, Small, assert_close, assert_same, conv, fuse, pair, random_input
from tolerances import assert_within
from torch import Tensor, nn

import bnext

ACTIVATIONS: list[tuple[nn.Module, object]] = [
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (nn.LeakyReLU(0.3), ("leaky_relu", 0.3)),
    (nn.SiLU(inplace=True), "silu"),
    (nn.GELU(), "gelu"),
    (nn.Hardswish(), "hardswish"),
    (nn.LeakyReLU(-0.5), ("leaky_relu", -0.5)),
    (nn.GELU(approximate="tanh"), None),
    (nn.ReLU6(), None),
    (nn.PReLU(), None),
    (nn.Identity(), None),
    (nn.Dropout(0.0), None),
]


@pytest.mark.parametrize(("activation", "act"), ACTIVATIONS, ids=repr)
def test_known_activations(activation: nn.Module, act: object) -> None:
    original, fused, report = pair(lambda: nn.Sequential(conv(3), nn.BatchNorm2d(3), activation))
    assert len(report.fused) == (act is not None)
    assert getattr(fused[1], "act", None) == act
    assert_same(original, fused, random_input())


FUNCTIONS: list[tuple[Callable[..., Tensor], object]] = [
    (F.relu, "relu"),
    (partial(F.relu, inplace=True), "relu"),
    (F.relu_, "relu"),
    (torch.relu, "relu"),
    (torch.relu_, "relu"),
    (methodcaller("relu"), "relu"),
    (methodcaller("relu_"), "relu"),
    (F.silu, "silu"),
    (partial(F.silu, inplace=True), "silu"),
    (F.hardswish, "hardswish"),
    (F.gelu, "gelu"),
    (partial(F.gelu, approximate="tanh"), None),
    (F.leaky_relu, ("leaky_relu", 0.01)),
    (partial(F.leaky_relu, negative_slope=0.2, inplace=True), ("leaky_relu", 0.2)),
    (partial(F.leaky_relu, negative_slope=-0.2), ("leaky_relu", -0.2)),
    (F.relu6, None),
    (torch.tanh, None),
]


class Function(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.bn(self.conv(x)))


@pytest.mark.parametrize(("function", "act"), FUNCTIONS, ids=[str(n) for n, _ in enumerate(FUNCTIONS)])
def test_known_functions(function: Callable[[Tensor], Tensor], act: object) -> None:
    cls = type("Function", (Function,), {"function": staticmethod(function)})
    original, fused, report = pair(cls)
    assert len(report.fused) == (act is not None), report
    assert getattr(fused.bn, "act", None) == act
    assert_same(original, fused, random_input())


def with_number(y: Tensor, x: Tensor) -> Tensor:
    return y + 1


def with_vector(y: Tensor, x: Tensor) -> Tensor:
    return y + x.mean((2, 3), keepdim=True)


def with_itself(y: Tensor, x: Tensor) -> Tensor:
    return y + y


def swapped(y: Tensor, x: Tensor) -> Tensor:
    return x + y


def into_input(y: Tensor, x: Tensor) -> Tensor:
    x += y
    return x


SUMS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "y + x": (operator.add, True),
    "x + y": (swapped, True),
    "y += x": (operator.iadd, True),
    "torch.add": (partial(torch.add, alpha=1), True),
    "alpha": (partial(torch.add, alpha=2), False),
    "subtraction": (operator.sub, False),
    "a number": (with_number, False),
    "a mean": (with_vector, False),
    "itself": (with_itself, False),
    "the caller's tensor, in place": (into_input, False),
}


class Sum(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.function(self.bn(self.conv(x)), x))


@pytest.mark.parametrize(("function", "fusible"), SUMS.values(), ids=list(SUMS))
def test_known_sums(function: Callable[..., object], fusible: bool) -> None:
    cls = type("Sum", (Sum,), {"function": staticmethod(function)})
    original, fused, report = pair(cls)
    assert len(report.fused) == fusible, report
    x = random_input()
    if function is not into_input:  # which has no gradient in torch either
        assert_same(original, fused, x)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        assert_close(fused(a), original(b), "output")
    assert_close(a, b, "the input afterwards")


class Pooled(Small):
    """The residual is broadcast, which only its values show."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.pool(x) + self.bn(self.conv(x)))


class TwoInputs(Small):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        out += residual
        return F.relu(out)


class OutOfPlace(Small):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + residual)


def test_a_residual_that_is_broadcast_or_promoted_is_added_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bnext.BatchNormAct2d.forward

    def strict(self: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
        assert (residual.shape, residual.dtype) == (input.shape, input.dtype)
        return forward(self, input, residual)

    monkeypatch.setattr(bnext.BatchNormAct2d, "forward", strict)
    original, fused, report = pair(Pooled)
    assert len(report.fused) == 1
    assert_same(original, fused, random_input())
    for cls in (TwoInputs, OutOfPlace):
        original, fused, report = pair(cls)
        assert len(report.fused) == 1
        for residual in (random_input(1, 3, 1, 1), random_input().float(), 0.5):
            assert_same(original, fused, random_input(), residual)
        for model in (original, fused):
            model.float()
        x = random_input().float()
        with torch.autocast("cpu", torch.bfloat16):
            a, b = original(x, x), fused(x, x)
        assert a.dtype == b.dtype == (torch.bfloat16 if cls is TwoInputs else torch.float32)
        # Where the sum is float32 in both, it is that of the same bfloat16 values.
        assert_within(b, a.detach().double(), 2.0**-7 * (1 + a.detach().double().abs()), "output")


class SecondUse(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.silu(y) * y


class ChangedBetween(Small):
    """The batch norm's input is changed before the sum: computed at the sum, it would see that."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        return F.relu(out + x.mul_(2).relu())


class CalledBetween(Small):
    """Moved behind its second call, the first would update the running statistics last."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn(self.conv(x))
        second = F.relu(self.bn(x))
        return F.relu(first + second)


class SumBehindSecondName(Small):
    """The tensor that the sum changes in place has another name."""

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv(x)
        other = residual[:, :1]
        residual += self.bn(x)
        return F.relu(residual) + other


class Features(Small):
    """The method alone must go on returning what it did, too."""

    def features(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


class Steps(nn.Module):
    """Looks between a batch norm and its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.SiLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.body:
            x = layer(x)
            found.append(x)
        return found


class HiddenSteps(nn.Module):
    """The same in a forward that is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.SiLU())

    def forward(self, x: Tensor, wanted: int = 1) -> list[Tensor]:
        return [x := layer(x) for layer in self.body]


class DeepHiddenSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.SiLU())])

    def forward(self, x: Tensor, wanted: int = 1) -> list[Tensor]:
        return [x := layer(x) for stage in self.stages for layer in stage]


class Encoder(nn.Module):
    """Calls the layers of a network, not the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Silu()

    def forward(self, x: Tensor) -> Tensor:
        return self.net.bn(x).sin()


class Silu(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class ActivationElsewhere(nn.Module):
    """The slot of the activation is called for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body[2](self.body(x))


class SeenThroughAndWhole(nn.Module):
    """One Sequential, once with a sum and activation behind it and once without."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.body(x) + x) + self.body(x).mul(2)


LEFT: dict[str, tuple[type[nn.Module], str]] = {
    "second use": (SecondUse, ""),
    "changed between": (ChangedBetween, "may change its input"),
    "called between": (CalledBetween, "may change its input"),
    "sum by another name": (SumBehindSecondName, "others may hold"),
    "method": (Features, "features() calls it"),
    "steps": (Steps, ""),
    "hidden steps": (HiddenSteps, "forward() takes the Sequential"),
    "hidden steps, two levels": (DeepHiddenSteps, "forward() takes the Sequential"),
    "layers of another": (Encoder, "Encoder.forward() may call it"),
    "activation elsewhere": (ActivationElsewhere, "called from elsewhere"),
    "seen through and whole": (SeenThroughAndWhole, "want different activations"),
}


@pytest.mark.parametrize(("cls", "reason"), LEFT.values(), ids=list(LEFT))
def test_what_would_be_wrong_is_left(cls: type[nn.Module], reason: str) -> None:
    original, fused, report = pair(cls)
    assert report.fused == []
    if reason:
        assert any(reason in why for _, why in report.left), report
    x = random_input()
    for training in (True, False):
        with torch.no_grad():
            a, b = fused.train(training)(x.clone()), original.train(training)(x.clone())
        assert_close(a, b, "output")
        assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    if cls is Features:
        assert_close(fused.features(x), original.features(x), "a method's result")


class Stages(nn.Module):
    """Not traced, but it calls each Sequential as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.SiLU()) for _ in range(2)])

    def forward(self, x: Tensor, wanted: int = 1) -> list[Tensor]:
        return [x := stage(x) for stage in self.stages]


def test_a_sequential_is_fused_in_a_forward_that_is_not() -> None:
    original, fused, report = pair(Stages)
    assert [name for name, _ in report.fused] == ["stages.0.1", "stages.1.1"]
    assert [name for name, _ in report.left] == ["(the module itself)"]
    assert report.alone == 0
    x = random_input()
    assert_close(fused(x), original(x), "output")


def test_a_helper_method_may_apply_relu_again() -> None:
    original, fused, _ = pair(networks.ResNet)
    x = random_input()
    assert_close(fused._forward_impl(x), original._forward_impl(x), "a method's result")


@pytest.mark.parametrize("watched", ["bn", "relu", "body.1", "body.2"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_still_see_what_they_saw(watched: str, kind: str) -> None:
    class Watched(Basic):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
            self.body = nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.bn(self.body(x)))

    original = Watched().double()
    fused = copy.deepcopy(original)
    seen: list[list[Tensor]] = [[], []]
    for model, values in zip((original, fused), seen, strict=True):
        layer = model.get_submodule(watched)

        def hook(_: nn.Module, *args: object, values: list[Tensor] = values) -> None:
            values.append(args[-1] if isinstance(args[-1], Tensor) else args[-1][0])

        getattr(layer, f"register_{kind}_hook")(hook)
    report = fuse(fused)
    assert len(report.fused) == 1
    assert any("hooks" in why for _, why in report.left)
    assert_same(original, fused, random_input())
    assert len(seen[0]) >= 2
    assert_close(seen[1], seen[0], "what the hook saw")


def test_lazy_and_parametrized_layers_are_left() -> None:
    class Positive(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.exp()

    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    model = nn.Sequential(layer, nn.ReLU(), nn.LazyBatchNorm2d(), nn.ReLU())
    assert fuse(model).fused == []
    assert [type(m) for m in model[1:]] == [nn.ReLU, bnext.LazyBatchNorm2d, nn.ReLU]
