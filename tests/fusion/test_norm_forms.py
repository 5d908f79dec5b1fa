"""The ways a batch norm before an activation is written: as a function, frozen, lazy, of a class that convert does not
know."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from networks import assert_close, conv
from observe import Net, assert_fuses, assert_same_results, assert_same_steps, pair, sequential, small
from torch import Tensor, nn

import bnext


def of_slices(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x[:, :2], mean[:2], var[1:], weight[:2], bias[:2], training)


# Functions of the input, a layer's statistics and parameters, and whether it is in training; and whether each is fused.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "by position": (lambda *arguments: F.batch_norm(*arguments, 0.2, 1e-3), 1),
    "by name": (
        lambda x, mean, var, weight, bias, training: F.batch_norm(
            eps=1e-3, input=x, training=training, bias=bias, running_var=var, running_mean=mean
        ),
        1,
    ),
    "torch.batch_norm": (
        lambda x, mean, var, weight, bias, training: torch.batch_norm(
            x, weight, bias, mean, var, training, 0.2, 1e-3, False
        ),
        1,
    ),
    "bnext's own": (lambda *arguments: bnext.functional.batch_norm(*arguments, 0.2, 1e-3), 1),
    "without statistics": (lambda x, mean, var, *rest: F.batch_norm(x, None, None, *rest[:2], True), 1),
    "always evaluates": (lambda *arguments: F.batch_norm(*arguments[:5]), 1),
    "of slices": (of_slices, 1),
    "instance norm": (lambda x, mean, var, weight, bias, _: F.instance_norm(x, weight=weight, bias=bias), 0),
}


def test_functional_batch_norms() -> None:
    def behind(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(self: Net, x: Tensor, r: Tensor) -> Tensor:
            bn = self.bn
            return F.relu(function(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training))

        return forward

    patterns = {name: Pattern(behind(function), pairs) for name, (function, pairs) in FUNCTIONS.items()}
    assert failures(patterns, modes=("training", "evaluation", "evaluation, no_grad")) == {}


class Quiet(nn.BatchNorm2d):
    """A user's subclass, with the forward of its base."""


def test_a_subclass_with_the_forward_of_its_base_is_fused() -> None:
    original, fused = pair(lambda: nn.Sequential(conv(3, 1), Quiet(3), nn.ReLU()))
    assert type(fused[1]) is Quiet
    assert_same_steps(original, fused, small())
    assert_fuses(original, fused, small())


def test_layers_that_are_frozen_in_a_model_in_training_are_fused() -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(), sequential(conv(3, 1))))
    assert_same_steps(original, fused, small(), modes=("training",))
    for model in (original, fused):
        for norm in (model[0][1], model[1][1]):
            norm.eval().requires_grad_(False)
            norm.train = lambda mode=True, norm=norm: norm  # so that train() of the model leaves the layer frozen
    assert_same_steps(original, fused, small())
    assert_fuses(original, fused, small(), pairs=2)


def test_lazy_layers_are_fused_when_they_are_initialised() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyBatchNorm2d(), nn.Flatten())

    original, fused = make().double(), bnext.convert(make().double(), fuse=True)
    x = small()
    assert_same_results(original, fused, lambda model: model(x))
    assert [type(m) for m in fused[:4]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d]
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    assert_same_steps(original, fused, x)
    assert_fuses(original, fused, x)


def test_nothing_is_fused_in_a_single_layer_or_a_model_without_batch_norms() -> None:
    for make in (lambda: nn.BatchNorm2d(3), lambda: nn.Sequential(conv(3, 1), nn.ReLU())):
        original, fused = pair(make)
        assert_same_steps(original, fused, small())
        assert bnext.fusion_report(fused).fused == []
    layer = bnext.convert(nn.BatchNorm2d(3), fuse=True)
    layer(torch.randn(2, 3, 4, 4))
    ((name, why),) = bnext.fusion_report(layer).left
    assert "returned" in why, name
