"""How often fused calls are captured if sizes, modes, counters and settings change; and what dynamo's limit does."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import Basic, assert_close
from observe import Net, assert_fuses, assert_same_results, assert_same_steps, counted_graphs, pair, sequential, small
from torch import Tensor, nn

import bnext


@pytest.mark.usefixtures("fresh_compiler")
def test_a_program_compiles_no_more_often_than_torch_does() -> None:
    """The program trains and evaluates in five batch sizes."""
    numbers = []
    for fuse in (False, True):
        torch._dynamo.reset()
        model = Basic(3)
        called = bnext.convert(model, fuse=True) if fuse else torch.compile(model, backend="eager")
        with counted_graphs() as graphs:
            for n, training in itertools.product((4, 8, 3, 5, 16) * 2, (True, False)):
                model.train(training)
                with torch.set_grad_enabled(training):
                    called(torch.randn(n, 3, 6, 5))
            numbers.append(graphs())
    assert 0 < numbers[1] <= numbers[0]


def test_calls_in_other_sizes_compute_the_same() -> None:
    original, fused = pair(lambda: Basic(3))
    for n, h in ((2, 5), (3, 5), (7, 6), (1, 8), (2, 5), (0, 4)):
        x = torch.randn(n, 3, h, 4, dtype=torch.float64)
        assert_same_steps(original, fused, x, modes=("training",), steps=1)
    assert_fuses(original, fused, torch.randn(9, 3, 3, 3, dtype=torch.float64), pairs=2, sums=1)


@pytest.mark.usefixtures("fresh_compiler")
def test_sizes_of_one_model_do_not_affect_the_next() -> None:
    """Dynamo compiles the first size of a model as a constant, whatever sizes other models were called with."""
    numbers = []
    for n in (20, 30, 40):
        fused = bnext.convert(sequential(nn.Flatten()), fuse=True)
        with counted_graphs() as graphs:
            for size in (n, n + 1, n + 2):
                fused(torch.randn(size, 3, 4, 4))
            numbers.append(graphs())
    assert numbers == [2, 2, 2]


def test_beyond_dynamos_limit_results_are_right_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo limits the number of graphs, and each new momentum needs another one."""
    original, fused = pair(lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(3), nn.ReLU()))
    x = small()
    with caplog.at_level(logging.WARNING):
        for n in range(40):
            original[1].momentum = fused[1].momentum = 1 / (n + 2)
            assert_close(fused(x), original(x), "output")
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    (record,) = caplog.records
    assert "limit" in record.getMessage()
    original[1].momentum = fused[1].momentum = 0.5
    assert_same_steps(original, fused, x, modes=("training",))


def test_a_slope_may_change_from_call_to_call_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    original, fused = pair(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.1)))
    for slope in (0.1, 0.2, 0.3):
        original[1].negative_slope = fused[1].negative_slope = slope
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_counters_and_state_of_a_module_do_not_recompile() -> None:
    class Counts(Net):
        step = 0

        def forward(self, x: Tensor) -> Tensor:
            self.step += 1
            return F.relu(self.bn(self.conv(x))) * self.step

    original, fused = pair(Counts)
    for _ in range(3):
        assert_same_results(original, fused, lambda model: model(small()))
    with counted_graphs() as graphs:
        for _ in range(5):
            assert_same_results(original, fused, lambda model: model(small()))
        assert graphs() == 0
    assert fused.step == original.step == 8
