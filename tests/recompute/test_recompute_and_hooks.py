"""Recompute together with activation checkpointing, other hooks of saved tensors, and save_on_cpu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_input
from checkpoint_kinds import KINDS
from recomputing import SHAPE, Net, Scope, assert_same, gradients, held_bytes, leaves
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import bnext

CHECKPOINTS: dict[str, dict[str, Any]] = {**KINDS, "to the end": {"use_reentrant": False, "early_stop": False}}


class Residuals(Net):
    """Adds residuals, one of which a convolution saves, too, also while a checkpoint runs the forward again."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        h = self.features[3](self.features[2](h), h.sin())
        return self.last(self.features[3](self.features[2](h), h))


def inside(net: Net, x: Tensor, scope: Scope, kind: str) -> Tensor:
    """The output of the checkpoint is also used outside of it."""
    with scope():
        first = checkpoint(net.features, x, **CHECKPOINTS[kind])
        return net.last(first) + net.last(checkpoint(net.features[2:], first, **CHECKPOINTS[kind]))


def around(net: Net, x: Tensor, scope: Scope, kind: str) -> Tensor:
    def region(x: Tensor) -> Tensor:
        with scope():
            return net(x)

    return checkpoint(region, x, **CHECKPOINTS[kind])


def around_all(net: Net, x: Tensor, scope: Scope, kind: str) -> Tensor:
    with scope():
        return checkpoint(net, x, **CHECKPOINTS[kind])


def one_in_another(net: Net, x: Tensor, scope: Scope, kind: str) -> Tensor:
    def region(x: Tensor) -> Tensor:
        with scope():
            return inside(net, x, scope, "not reentrant")

    return checkpoint(region, x, **CHECKPOINTS[kind])


@pytest.mark.parametrize(
    ("where", "make"),
    [
        (inside, Net),
        (around, Net),
        (around, Residuals),
        (around_all, Net),
        (around_all, Residuals),
        (one_in_another, Net),
    ],
)
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind: str, where: Callable[..., Tensor], make: Callable[[], Net]) -> None:
    """Checkpoints inside the scope of recompute and around it give the same bits."""

    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        y = where(net, x, scope, kind)
        y.square().sum().backward()
        return [y, *(t.grad for t in leaves(net, x))]

    assert_same(scenario, make=make)


@pytest.mark.parametrize("where", [inside, around, around_all])
def test_a_checkpoint_holds_no_more(where: Callable[..., Tensor]) -> None:
    net, x = Residuals(), make_input(SHAPE).requires_grad_()
    expected = held_bytes(lambda: where(net, x, torch.enable_grad, "not reentrant"))
    actual = held_bytes(lambda: where(net, x, bnext.recompute, "not reentrant"))
    copies = 5 * 2 * 4 * 4  # the bytes of the copied weights and biases
    assert actual <= expected + copies


def boxed(t: Tensor) -> list[Tensor]:
    """A copy in a list, from which it can be popped only once."""
    return [t.detach().clone()]


def to_channels_last(t: Tensor) -> Tensor:
    return t.detach().to(memory_format=torch.channels_last) if t.dim() == 4 else t


PAIRS: dict[str, Callable[[], Any]] = {
    "save_on_cpu": save_on_cpu,
    "given back once": lambda: saved_tensors_hooks(boxed, list.pop),
    "in another layout": lambda: saved_tensors_hooks(to_channels_last, lambda t: t),
}


@pytest.mark.parametrize("make", [Net, Residuals])
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("pair", PAIRS)
def test_other_hooks_inside_or_outside_change_nothing(pair: str, outside: bool, make: Callable[[], Net]) -> None:
    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        others = PAIRS[pair]
        with others() if outside else scope():
            with scope() if outside else others():
                h = net.features(x)
            with scope():
                y = net.last(h) + net(x)
        return [y, *gradients(y, leaves(net, x))]

    assert_same(scenario, make=make)


def test_hooks_around_get_what_is_not_recomputed_and_their_errors_come_out() -> None:
    net, x = Net(), make_input(SHAPE)
    packed: list[tuple[int, ...]] = []

    def unpack(t: Tensor) -> Tensor:
        raise LookupError("lost")

    with saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t, unpack), bnext.recompute():
        h = net.features[1](net.features[0](x))
        before = len(packed)
        y = h.flatten(1).square()
        assert len(packed) == before
        y = y.exp()
        assert packed[before:] == [tuple(y.shape)]
    with pytest.raises(LookupError, match="lost"):
        gradients(y, net.features[:2].parameters())
