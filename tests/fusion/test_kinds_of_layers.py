"""Batch norms of every kind before an activation: functional, frozen, lazy, of unknown classes, synchronised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import fusion_jobs
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from networks import OwnNorm, assert_close, conv
from observe import assert_fuses, assert_same_steps, count, fused_names, pair, sequential, small
from processes import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnext


def by_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, x, r: F.relu(function(self.bn, x, self.training))


def positional(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.2, 1e-3)


def by_name(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(
        eps=1e-3, input=x, training=training, bias=bn.bias, running_var=bn.running_var, running_mean=bn.running_mean
    )


def torchs(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return torch.batch_norm(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, training, 0.2, 1e-3, False)


def ours(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return bnext.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, training, 0.2, 1e-3)


def without_statistics(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, None, None, bn.weight, bn.bias, True)


def always_evaluates(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


def of_a_slice(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x[:, :2], bn.running_mean[:2], bn.running_var[1:], bn.weight[:2], bn.bias[:2], training)


def instance(bn: nn.BatchNorm2d, x: Tensor, training: bool) -> Tensor:
    return F.instance_norm(x, weight=bn.weight, bias=bn.bias)


FUNCTIONS = {
    "by position": Pattern(by_function(positional)),
    "by name": Pattern(by_function(by_name)),
    "torch.batch_norm": Pattern(by_function(torchs)),
    "bnext's own": Pattern(by_function(ours)),
    "without statistics": Pattern(by_function(without_statistics)),
    "always evaluates": Pattern(by_function(always_evaluates)),
    "of slices": Pattern(by_function(of_a_slice)),
    "instance norm": Pattern(by_function(instance), 0),
}


def test_functional_batch_norms() -> None:
    wrong = failures(FUNCTIONS, modes=("training", "evaluation", "evaluation, no_grad"))
    assert {name: why for name, why in wrong.items() if "the report" not in why} == {}


class Quiet(nn.BatchNorm2d):
    """A subclass that adds nothing to the forward, but is unknown."""


class Noisy(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1) * 2 if self.training else super().forward(input)


class Own(nn.Module):
    """Batch norm written down by its owner, and one by formula."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Formula(Own):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, unbiased=False)
        return (x - mean) * (var + 1e-5).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize(("cls", "pairs"), [(Quiet, 1), (Noisy, 0), (OwnNorm, 0), (Own, 1), (Formula, 0)])
def test_classes_that_nobody_knows(cls: type[nn.Module], pairs: int, caplog: pytest.LogCaptureFixture) -> None:
    make = (lambda: cls()) if issubclass(cls, Own) else (lambda: cls(3))
    original, fused = pair(lambda: nn.Sequential(conv(3, 1), make(), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU()))
    assert type(fused[1]) is cls
    assert_same_steps(original, fused, small())
    assert_fuses(original.train(), fused.train(), small(), pairs=pairs + 1)
    assert "3" in fused_names(fused)


@pytest.mark.parametrize("freeze", [bnext.freeze if hasattr(bnext, "freeze") else None, "by hand"])
def test_frozen_layers(freeze: Any) -> None:
    if freeze is None:
        pytest.skip("bnext.freeze has not come yet")
    original, fused = pair(lambda: nn.Sequential(sequential(), sequential(nn.Conv2d(3, 2, 1))))
    assert_same_steps(original, fused, small(), modes=("training",))
    for model in (original, fused):
        for norm in (model[0][1], model[1][1]):
            norm.eval().requires_grad_(False)
            norm.train = lambda mode=True, norm=norm: norm  # survives .train()
    assert_same_steps(original, fused, small())
    assert_fuses(original.train(), fused.train(), small(), pairs=2)


def test_lazy_layers() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyBatchNorm2d(), nn.Flatten())

    original, fused = make().double(), bnext.convert(make().double(), fuse=True)
    x = small()
    torch.manual_seed(1)
    first = original(x)
    torch.manual_seed(1)
    assert_close(fused(x), first, "output")
    assert [type(m) for m in fused[:4]] == [nn.Conv2d, bnext.BatchNorm2d, nn.ReLU, bnext.BatchNorm2d]
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    assert_same_steps(original, fused, x)
    assert_fuses(original.train(), fused.train(), x)


def test_a_single_layer_and_one_without_batch_norms(caplog: pytest.LogCaptureFixture) -> None:
    for make, x in ((lambda: nn.BatchNorm2d(3), small()), (lambda: nn.Sequential(conv(3, 1), nn.ReLU()), small())):
        original, fused = pair(make)
        assert_same_steps(original, fused, x)
        assert bnext.fusion_report(fused).fused == []
    layer = bnext.convert(nn.BatchNorm2d(3), fuse=True)
    layer(torch.randn(2, 3, 4, 4))
    ((name, why),) = bnext.fusion_report(layer).left
    assert "returned" in why, name


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("order", ["at once", "fuse first"])
def test_synchronised_layers_are_fused(order: str) -> None:
    original = nn.Sequential(sequential(), sequential(nn.Conv2d(3, 2, 1))).double()
    fused = copy.deepcopy(original)
    if order == "at once":
        bnext.convert(fused, fuse=True, sync=True)
    else:
        bnext.convert(bnext.convert(fused, fuse=True), sync=True)
    assert_same_steps(original, fused, small())
    assert_fuses(original.train(), fused.train(), small(), pairs=2)


def test_in_several_processes(pools: Callable[[int], Pool]) -> None:
    for job in (fusion_jobs.no_collective_is_passed, fusion_jobs.one_rank_may_be_unfused, fusion_jobs.data_parallel):
        pools(2).run(job, seed=3)


@pytest.mark.usefixtures("group")
def test_data_parallel_around_and_inside() -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(), sequential(nn.Conv2d(3, 2, 1))))
    wrapped = DistributedDataParallel(fused)
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert_same_steps(original, wrapped, small(), modes=("training",))
    assert count(wrapped(small())) == 0
    inner = nn.Sequential(DistributedDataParallel(copy.deepcopy(original[0])), copy.deepcopy(original[1]))
    assert_same_steps(original, bnext.convert(inner, fuse=True), small())
