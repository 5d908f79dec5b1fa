"""The counter itself, on networks small enough to count by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from counting import Census, Pair, census, left
from real_models import tensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.functional import batch_norm_act

Forward = Callable[["Net", Tensor], object]


class Net(nn.Module):
    """Batch norms behind convolutions, and a forward that is a function of them."""

    def __init__(self, forward: Forward, affine: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3, affine=affine), nn.BatchNorm2d(3, affine=affine)
        self.conv = nn.Conv2d(3, 3, 1)
        self.called = forward

    def forward(self, x: Tensor) -> object:
        return self.called(self, self.conv(x))


def count(net: nn.Module) -> Census:
    return census(net, tensors(net(torch.randn(2, 3, 4, 4, requires_grad=True))))


def pair(act: str, *norms: str, summed: bool = False) -> Pair:
    return Pair(act, summed, frozenset(norms))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "relu": (F.relu, torch.relu_),
    "relu6": (F.relu6, lambda y: F.hardtanh_(y, 0.0, 6.0)),
    "leaky_relu": (lambda y: F.leaky_relu(y, 0.2), lambda y: F.leaky_relu_(y, 0.1)),
    "silu": (F.silu, lambda y: F.silu(y, inplace=True)),
    "gelu": (F.gelu, nn.GELU()),
    "hardswish": (F.hardswish, lambda y: F.hardswish(y, inplace=True)),
    "elu": (lambda y: F.elu(y, 0.7), F.elu_),
    "mish": (F.mish, lambda y: F.mish(y, inplace=True)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_a_pair(name: str) -> None:
    for act in ACTIVATIONS[name]:
        assert count(Net(lambda net, x, act=act: act(net.a(x)))) == Census(1, 0, [pair(name, "a")])


@pytest.mark.parametrize(
    "act",
    [
        torch.sigmoid,
        torch.tanh,
        F.hardsigmoid,
        F.hardtanh,
        F.selu,
        F.celu,
        F.softplus,
        lambda y: F.gelu(y, approximate="tanh"),
        lambda y: y.clamp(min=0),
    ],
)
def test_another_function_is_none(act: Callable[[Tensor], Tensor]) -> None:
    assert count(Net(lambda net, x: act(net.a(x)))).pairs == []


def in_place(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    y += x
    return y.relu_()


def into_the_residual(net: Net, x: Tensor) -> Tensor:
    x = x * 2
    x += net.a(x)
    return F.relu_(x)


def two_consumers(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    return F.relu(y) * torch.sigmoid(y)


def returned(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.a(x)
    return F.relu(y), y


def returned_sum(net: Net, x: Tensor) -> dict[str, Tensor]:
    y = net.a(x) + x
    return {"out": F.relu(y), "sum": y}


def read_before_written(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    z = y * 2
    return F.relu_(y) + z


def one_of_two(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = net.a(x)
    return F.relu(y + net.b(x)), y


def shared(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.a(net.conv(F.relu(net.a(x)))))


def three_terms(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.a(x) + x + x * 2)


def three_terms_norm_last(net: Net, x: Tensor) -> Tensor:
    return F.relu(x * 2 + x + net.a(x))


def checkpointed(net: Net, x: Tensor) -> Tensor:
    return checkpoint(lambda z: F.relu(net.a(z)), x, use_reentrant=False)


SUM_A, SUM_AB = pair("relu", "a", summed=True), pair("relu", "a", "b", summed=True)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda net, x: F.relu(net.a(x) + x), [SUM_A]),
        (lambda net, x: F.relu(x + net.a(x)), [SUM_A]),
        (lambda net, x: F.relu(net.a(x) + net.b(x)), [SUM_AB]),
        (in_place, [SUM_A]),
        (into_the_residual, [SUM_A]),
        (one_of_two, [pair("relu", "b", summed=True)]),
        (three_terms_norm_last, [SUM_A]),
        (shared, [pair("relu", "a")] * 2),
        (checkpointed, [pair("relu", "a")]),
        (lambda net, x: F.silu(net.b(F.relu(net.a(x)))), [pair("relu", "a"), pair("silu", "b")]),
        (lambda net, x: F.relu(F.relu(net.a(x))), [pair("relu", "a")]),
        # Nothing that could be fused.
        (three_terms, []),
        (two_consumers, []),
        (returned, []),
        (returned_sum, []),
        (read_before_written, []),
        (lambda net, x: net.a(x), []),
        (lambda net, x: F.relu(net.conv(net.a(x))), []),
        (lambda net, x: F.relu(torch.add(x, net.a(x), alpha=2)), []),
        (lambda net, x: F.relu(net.a(x) + 1), []),
        (lambda net, x: F.relu(net.a(x) * x), []),
        (lambda net, x: F.relu(net.a(x) + x.mean((2, 3), keepdim=True)), []),
        (lambda net, x: F.relu(net.a(x[:1]) + x), []),
        (lambda net, x: F.relu(net.a(x) - x), []),
    ],
)
def test_pairs(forward: Forward, expected: list[Pair]) -> None:
    assert count(Net(forward)).pairs == expected


def test_without_parameters_a_layer_has_no_name() -> None:
    assert count(Net(lambda net, x: F.relu(net.a(x)), affine=False)).pairs == [pair("relu", "?")]


def test_a_reentrant_checkpoint_is_refused() -> None:
    net = Net(lambda net, x: checkpoint(lambda z: F.relu(net.a(z)), x, use_reentrant=True))
    with pytest.raises(ValueError, match="reentrant"):
        count(net)


def test_whose_the_batch_norms_are() -> None:
    net = Net(lambda net, x: F.relu(net.b(net.a(x))))
    net.a = bnext.BatchNorm2d(3)
    assert count(net) == Census(2, 1, [pair("relu", "b")])


def fused(net: Net, name: str, x: Tensor, residual: Tensor | None = None, act: str = "relu") -> Tensor:
    bn = getattr(net, name)
    return batch_norm_act(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual, True, act=act)


def gap(original: Forward, converted: Forward) -> list[Pair]:
    """What is left of the original, in another network that computes the same."""
    net = Net(original)
    twin = copy.deepcopy(net)
    twin.called = converted
    x = torch.randn(2, 3, 4, 4)
    for ours, theirs in zip(tensors(twin(x)), tensors(net(x)), strict=True):
        torch.testing.assert_close(ours, theirs)
    return left(count(net), count(twin))


def two(net: Net, x: Tensor) -> Tensor:
    return F.silu(net.b(F.relu(net.a(x))))


def ours(net: Net, name: str, x: Tensor) -> Tensor:
    return fused(net, name, x, act="identity")


def test_what_is_left() -> None:
    assert gap(two, lambda net, x: F.silu(net.b(fused(net, "a", x)))) == [pair("silu", "b")]
    assert gap(two, lambda net, x: F.silu(ours(net, "b", F.relu(net.a(x))))) == [pair("relu", "a"), pair("silu", "b")]
    assert gap(two, lambda net, x: F.silu(ours(net, "b", fused(net, "a", x)))) == [pair("silu", "b")]
    assert gap(lambda net, x: F.relu(net.a(x) + x), lambda net, x: F.relu(ours(net, "a", x) + x)) == [SUM_A]


def test_an_activation_behind_a_fused_one_is_not_left() -> None:
    """It could not be fused, and a fused batch norm looks as one that is not."""
    assert gap(lambda net, x: F.silu(F.relu(net.a(x))), lambda net, x: F.silu(fused(net, "a", x))) == []

    def rectified_twice(net: Net, x: Tensor) -> Tensor:
        return F.relu(F.relu(net.a(x)) + net.b(x))

    assert gap(rectified_twice, lambda net, x: fused(net, "b", x, fused(net, "a", x))) == []
    assert gap(rectified_twice, lambda net, x: F.relu(fused(net, "a", x) + ours(net, "b", x))) == [
        pair("relu", "b", summed=True)
    ]
    assert (
        gap(
            lambda net, x: F.relu(F.relu(net.a(x)) + net.conv(x)),
            lambda net, x: F.relu(fused(net, "a", x) + net.conv(x)),
        )
        == []
    )
