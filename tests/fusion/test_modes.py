"""Modes around and inside a model, sizes, and how often that compiles."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic, assert_close
from observe import (
    Net,
    assert_close_loosely,
    assert_fuses,
    assert_same_steps,
    count,
    counted_graphs,
    fused_names,
    pair,
    sequential,
    small,
    step,
)
from torch import Tensor, nn

import bnext


def test_modes_in_any_order() -> None:
    original, fused = pair(lambda: Basic(3))
    modes = ("evaluation, inference_mode", "training", "evaluation", "training, no_grad", "training")
    for mode in (*modes, "evaluation, no_grad", *modes):
        assert_same_steps(original, fused, small(), modes=(mode,), steps=1)
    assert_fuses(original.train(), fused.train(), small(), pairs=2, sums=1)


def test_inference_tensors_and_then_training() -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    with torch.inference_mode():
        x = small()
        assert_close(fused(x), original(x), "output")
    assert_same_steps(original, fused, small())
    with torch.inference_mode():
        assert_close(fused.eval()(x), original.eval()(x), "output")


def calls() -> list[tuple[bool, bool, int]]:
    """A program: training in five batch sizes with an evaluation of each, with and without gradients."""
    return [(t, t, n) for n, t in itertools.product((4, 8, 3, 5, 16), (True, False))] * 2


@pytest.mark.usefixtures("fresh_compiler")
def test_a_program_compiles_no_more_often_than_torch_does() -> None:
    graphs = []
    for fuse in (False, True):
        torch._dynamo.reset()
        model = Basic(3)
        called = bnext.convert(model, fuse=True) if fuse else torch.compile(model, backend="eager")
        with counted_graphs() as made:
            for training, grad, n in calls():
                model.train(training)
                with torch.set_grad_enabled(grad):
                    called(torch.randn(n, 3, 6, 5))
            graphs.append(made())
    assert 0 < graphs[1] <= graphs[0]


def test_sizes_compute_the_same() -> None:
    original, fused = pair(lambda: Basic(3))
    for n, h in ((2, 5), (3, 5), (7, 6), (1, 8), (2, 5), (0, 4)):
        x = torch.randn(n, 3, h, 4, dtype=torch.float64)
        assert_same_steps(original, fused, x, modes=("training",), steps=1)
    assert_fuses(original.train(), fused.train(), torch.randn(9, 3, 3, 3, dtype=torch.float64), pairs=2, sums=1)


@pytest.mark.usefixtures("fresh_compiler")
def test_sizes_of_one_model_are_nothing_to_the_next() -> None:
    """The first size of a model is compiled as a constant, whatever other models have been called with."""
    made = []
    for n in (20, 30, 40):
        fused = bnext.convert(sequential(nn.Flatten()), fuse=True)
        with counted_graphs() as graphs:
            for size in (n, n + 1, n + 2):
                fused(torch.randn(size, 3, 4, 4))
            made.append(graphs())
    assert made == [2, 2, 2]


def test_beyond_the_limit_there_is_one_warning_and_right_results(caplog: pytest.LogCaptureFixture) -> None:
    """A momentum that changes each step is another graph each time."""
    original, fused = pair(lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(3), nn.ReLU()))
    x = small()
    with caplog.at_level(logging.WARNING):
        for n in range(40):
            for model in (original, fused):
                model[1].momentum = 1 / (n + 2)
            assert_close(fused(x), original(x), "output")
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    assert len(caplog.records) <= 1
    for model in (original, fused):
        model[1].momentum = 0.5
    assert_same_steps(original, fused, x, modes=("training",))


AUTOCAST = {
    "around": lambda model, x: autocast(lambda: model(x)),
    "entered and left by turns": lambda model, x: torch.cat(
        [autocast(lambda: model(x)).float(), model(x), autocast(lambda: model(x)).float()]
    ),
}


def autocast(call: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


class Inside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.relu(self.bn(self.conv(x)))
        return F.silu(self.bn2(y.float()) + x)


class Between(Net):
    """The activation is outside."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.bn(self.conv(x))
        return F.relu(y)


@pytest.mark.parametrize("where", AUTOCAST)
@pytest.mark.parametrize("make", [Basic, Inside, Between])
def test_autocast(make: type[nn.Module], where: str) -> None:
    original = make(3) if make is Basic else make()
    plain, fused = bnext.convert(copy.deepcopy(original)), bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        expected, actual = (AUTOCAST[where](model, x) for model in (plain, fused))
        assert actual.dtype == expected.dtype
        assert_close_loosely(actual, expected, torch.bfloat16)
        expected.sum().backward()
        actual.sum().backward()
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is None:
            continue
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.1 * q.grad.abs().max().item() + 1e-2)
    if make is Between:
        assert count(actual) == count(expected)


def test_autocast_and_its_cache_see_updated_weights() -> None:
    plain = sequential(nn.Conv2d(3, 2, 1))
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
    for change in (
        lambda m: m[1].bn1.eval(),
        lambda m: m[0].requires_grad_(False),
        lambda m: m[1].train().bn1.requires_grad_(False).eval(),
        lambda m: m.requires_grad_(True).eval()[1].train(),
    ):
        for model in (original, fused):
            model.train()
            change(model)
        results = []
        for model in (original, fused):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
        for actual, expected in zip(*reversed(results), strict=True):
            assert_close(actual, expected, "results")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_dtype_changes(dtype: torch.dtype) -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    y = fused.to(dtype)(small().to(dtype))
    assert y.dtype == dtype
    assert count(y) == 0
    assert_close_loosely(y, bnext.convert(original).to(dtype)(small().to(dtype)) * 0 + y, dtype)


def test_a_default_device_and_default_dtype() -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    with torch.device("cpu"):
        assert_same_steps(original, fused, small(), modes=("training",))
        assert count(fused(small())) == 0
    assert_fuses(original, fused, small())


def test_second_derivatives() -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(act=nn.SiLU()), Basic(3), nn.Conv2d(3, 2, 1)))
    penalties = []
    for model in (original, fused):
        x = torch.linspace(-1, 1, 96, dtype=torch.float64).cos().view(2, 3, 4, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        penalties.append([gradient.detach(), x.grad, *(p.grad for p in model.parameters())])
    for actual, expected in zip(*reversed(penalties), strict=True):
        assert_close(actual, expected, "of second order")


def test_called_twice_before_backward_and_backward_twice() -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    a, b = small(), small()
    for model in (original, fused):
        y = model(a) * model(b) + model(a)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    assert_close([p.grad for p in fused.parameters()], [p.grad for p in original.parameters()], "gradients")


def test_random_numbers_are_the_same() -> None:
    make = lambda: nn.Sequential(nn.Dropout(0.3), *sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 2, 1)))  # noqa: E731
    original, fused = pair(make)
    for mode in ("training", "evaluation", "training"):
        states = []
        for model in (original, fused):
            torch.manual_seed(11)
            step(model, (torch.ones(4, 3, 5, 5, dtype=torch.float64),), mode)
            states.append(torch.get_rng_state())
        assert torch.equal(*states)
    assert_same_steps(original, fused, small())
    assert fused_names(fused) == ["2"]


def test_counters_and_state_of_a_module_do_not_recompile() -> None:
    class Counts(Net):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return F.relu(self.bn(self.conv(x))) * self.step

    original, fused = pair(Counts)
    x = small()
    for n in range(3):
        assert_close(fused(x), original(x), f"step {n}")
    with counted_graphs() as graphs, contextlib.nullcontext():
        for n in range(5):
            assert_close(fused(x), original(x), f"step {n}")
        assert graphs() == 0
    assert fused.step == original.step == 8
