"""Training, evaluation, grad modes, autocast, dtypes, devices and random numbers around and inside a fused model;
second derivatives, and several calls or backwards in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic, assert_close, conv
from observe import (
    Net,
    assert_close_loosely,
    assert_fuses,
    assert_same_results,
    assert_same_steps,
    count,
    net,
    pair,
    sequential,
    small,
)
from torch import nn

import bnext


def test_modes_in_any_order() -> None:
    original, fused = pair(lambda: Basic(3))
    modes = ("evaluation, inference_mode", "training", "evaluation", "training, no_grad", "training")
    assert_same_steps(original, fused, small(), modes=(*modes, "evaluation, no_grad", *modes), steps=1)
    assert_fuses(original, fused, small(), pairs=2, sums=1)


def test_inference_tensors_and_then_training() -> None:
    original, fused = pair()
    with torch.inference_mode():
        x = small()
        assert_close(fused(x), original(x), "output")
    assert_same_steps(original, fused, small())
    with torch.inference_mode():
        assert_close(fused.eval()(x), original.eval()(x), "output")


def autocast(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


AUTOCAST = {
    "around": lambda model, x: autocast(lambda: model(x)),
    "entered and left by turns": lambda model, x: torch.cat(
        [autocast(lambda: model(x)).float(), model(x), autocast(lambda: model(x)).float()]
    ),
}


INSIDE: dict[str, Callable[[], nn.Module]] = {
    "not inside": lambda: Basic(3),
    "inside": Net.with_forward(
        lambda self, x: F.silu(self.bn2(autocast(lambda: F.relu(self.bn(self.conv(x)))).float()) + x)
    ),
    "the activation outside": Net.with_forward(lambda self, x: F.relu(autocast(lambda: self.bn(self.conv(x))))),
}


@pytest.mark.parametrize("where", AUTOCAST)
@pytest.mark.parametrize("inside", INSIDE)
def test_autocast(inside: str, where: str) -> None:
    """Fusing changes outputs and gradients by roundings of bfloat16 alone, with autocast around the model or inside."""
    original = INSIDE[inside]()
    plain, fused = bnext.convert(copy.deepcopy(original)), bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        expected, actual = (AUTOCAST[where](model, x) for model in (plain, fused))
        assert actual.dtype == expected.dtype
        assert_close_loosely(actual, expected, torch.bfloat16)
        for y in (expected, actual):
            y.float().square().sum().backward()  # so that values that rounding moves across zero hardly count
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.1 * q.grad.abs().max().item() + 1e-2)
    if inside == "the activation outside":
        assert count(actual) == count(expected)


def test_autocast_and_its_cache_see_updated_weights() -> None:
    plain = net()
    fused = bnext.convert(copy.deepcopy(plain), fuse=True)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        for model in (plain, fused):
            autocast(lambda m=model: m(x)).sum().backward()
            with torch.no_grad():
                model[0].weight.add_(1.0)
        assert_close_loosely(autocast(lambda: fused(x)), autocast(lambda: plain(x)), torch.bfloat16)


def test_flags_of_parts_are_followed() -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(), Basic(3)))
    x = small()
    assert_same_steps(original, fused, x, modes=("training",))

    def after(change: Callable[[nn.Module], Any], model: nn.Module) -> list[Any]:
        model.train().zero_grad()
        change(model)
        y = model(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters()), *model.buffers()]

    for change in (
        lambda m: m[1].bn1.eval(),
        lambda m: m[0].requires_grad_(False),
        lambda m: m[1].train().bn1.requires_grad_(False).eval(),
        lambda m: m.requires_grad_(True).eval()[1].train(),
    ):
        assert_same_results(original, fused, partial(after, change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_dtype_changes(dtype: torch.dtype) -> None:
    original, fused = pair()
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    x = small().to(dtype)
    y = fused.to(dtype)(x)
    assert y.dtype == dtype
    assert count(y) == 0
    assert_close_loosely(y, bnext.convert(original).to(dtype)(x), dtype)


def test_a_default_device() -> None:
    original, fused = pair()
    with torch.device("cpu"):
        assert_same_steps(original, fused, small(), modes=("training",))
        assert count(fused(small())) == 0
    assert_fuses(original, fused, small())


def test_second_derivatives() -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(act=nn.SiLU()), Basic(3), conv(3, 1)))

    def penalty(model: nn.Module) -> list[Any]:
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).cos().view(2, 3, 4, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [gradient, x.grad, *(p.grad for p in model.parameters())]

    assert_same_results(original, fused, penalty)


def test_called_twice_before_backward_and_backward_twice() -> None:
    def gradients(model: nn.Module) -> list[Any]:
        a, b = small(), small()
        y = model(a) * model(b) + model(a)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert_same_results(*pair(), gradients)
