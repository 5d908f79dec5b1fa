"""counting.py itself, by which tests know what is fused: on networks small enough to count by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from counting import Census, Pair, census, left, tensors
from observe import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.functional import batch_norm_act

Forward = Callable[[Net, Tensor], object]


def count(net: nn.Module) -> Census:
    return census(net, tensors(net(torch.randn(2, 3, 4, 4, requires_grad=True))))


def pairs(forward: Forward) -> list[Pair]:
    return count(Net.of(forward)()).pairs


def pair(act: str, *norms: str, summed: bool = False) -> Pair:
    return Pair(act, summed, frozenset(norms))


OTHERS = (
    torch.sigmoid, torch.tanh, F.hardsigmoid, F.hardtanh, F.selu, F.celu, F.softplus,
    lambda y: F.gelu(y, approximate="tanh"), lambda y: y.clamp(min=0),
)  # fmt: skip


@pytest.mark.parametrize("act", OTHERS)
def test_another_function_is_none(act: Callable[[Tensor], Tensor]) -> None:
    assert pairs(lambda self, x: act(self.bn(x))) == []


ONE, SUM = pair("relu", "bn"), pair("relu", "bn", summed=True)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: F.relu(self.bn(x) + x), [SUM]),
        (lambda self, x: F.relu(x + self.bn(x)), [SUM]),
        (lambda self, x: F.relu(self.bn(x) + self.bn2(x)), [pair("relu", "bn", "bn2", summed=True)]),
        (lambda self, x: self.bn(x).add_(x).relu_(), [SUM]),
        (lambda self, x: F.relu_((x * 2).add_(self.bn(x))), [SUM]),
        (lambda self, x: (F.relu((y := self.bn(x)) + self.bn2(x)), y), [pair("relu", "bn2", summed=True)]),
        (lambda self, x: F.relu(x * 2 + x + self.bn(x)), [SUM]),
        (lambda self, x: F.relu(self.bn(self.conv(F.relu(self.bn(x))))), [ONE, ONE]),
        (lambda self, x: checkpoint(lambda z: F.relu(self.bn(z)), x, use_reentrant=False), [ONE]),
        (lambda self, x: F.silu(self.bn2(F.relu(self.bn(x)))), [ONE, pair("silu", "bn2")]),
        (lambda self, x: F.relu(F.relu(self.bn(x))), [ONE]),
        # Nothing that could be fused.
        (lambda self, x: F.relu(self.bn(x) + x + x * 2), []),
        (lambda self, x: F.relu(y := self.bn(x)) * torch.sigmoid(y), []),
        (lambda self, x: (F.relu(y := self.bn(x)), y), []),
        (lambda self, x: {"out": F.relu(y := self.bn(x) + x), "sum": y}, []),
        (lambda self, x: (y := self.bn(x)) * 2 + F.relu_(y), []),
        (lambda self, x: self.bn(x), []),
        (lambda self, x: F.relu(self.conv(self.bn(x))), []),
        (lambda self, x: F.relu(torch.add(x, self.bn(x), alpha=2)), []),
        (lambda self, x: F.relu(self.bn(x) + 1), []),
        (lambda self, x: F.relu(self.bn(x) * x), []),
        (lambda self, x: F.relu(self.bn(x) + x.mean((2, 3), keepdim=True)), []),
        (lambda self, x: F.relu(self.bn(x[:1]) + x), []),
        (lambda self, x: F.relu(self.bn(x) - x), []),
    ],
)
def test_pairs(forward: Forward, expected: list[Pair]) -> None:
    assert pairs(forward) == expected


def test_without_parameters_a_layer_has_no_name() -> None:
    assert count(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.ReLU())).pairs == [pair("relu", "?")]


def test_a_reentrant_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="reentrant"):
        pairs(lambda self, x: checkpoint(lambda z: F.relu(self.bn(z)), x, use_reentrant=True))


def test_whose_the_batch_norms_are() -> None:
    net = nn.Sequential(bnext.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU())
    assert count(net) == Census(2, 1, [pair("relu", "1")])


def fused(bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None, act: str = "relu") -> Tensor:
    return batch_norm_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual, True, act=act)


def ours(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return fused(bn, x, act="identity")


def gap(original: Forward, converted: Forward) -> list[Pair]:
    """What is left of the original, in another network that computes the same."""
    net, twin = Net.of(original)(), Net.of(converted)()
    twin.load_state_dict(copy.deepcopy(net.state_dict()))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(twin(x), net(x))
    return left(count(net), count(twin))


def two(self: Net, x: Tensor) -> Tensor:
    return F.silu(self.bn2(F.relu(self.bn(x))))


def rectified_twice(self: Net, x: Tensor) -> Tensor:
    return F.relu(F.relu(self.bn(x)) + self.bn2(x))


SILU = pair("silu", "bn2")


@pytest.mark.parametrize(
    ("original", "converted", "expected"),
    [
        (two, lambda self, x: F.silu(self.bn2(fused(self.bn, x))), [SILU]),
        (two, lambda self, x: F.silu(ours(self.bn2, F.relu(self.bn(x)))), [ONE, SILU]),
        (two, lambda self, x: F.silu(ours(self.bn2, fused(self.bn, x))), [SILU]),
        (lambda self, x: F.relu(self.bn(x) + x), lambda self, x: F.relu(ours(self.bn, x) + x), [SUM]),
        # An activation behind a fused one could not be fused, and a fused batch norm looks as one that is not.
        (lambda self, x: F.silu(F.relu(self.bn(x))), lambda self, x: F.silu(fused(self.bn, x)), []),
        (lambda self, x: F.relu(F.relu(self.bn(x)) + x), lambda self, x: F.relu(fused(self.bn, x) + x), []),
        (rectified_twice, lambda self, x: fused(self.bn2, x, fused(self.bn, x)), []),
        (
            rectified_twice,
            lambda self, x: F.relu(fused(self.bn, x) + ours(self.bn2, x)),
            [pair("relu", "bn2", summed=True)],
        ),
    ],
)
def test_what_is_left(original: Forward, converted: Forward, expected: list[Pair]) -> None:
    assert gap(original, converted) == expected
