"""Each way of writing batch norm, sum and activation down that is met in the field: what is fused, and the results."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_input
from networks import IMAGE, NETWORKS, assert_same
from torch import Tensor, nn

import bnext


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_and_that_it_computes_the_same(name: str) -> None:
    network = NETWORKS[name]
    original = network.make().double()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    x = make_input(network.shape, dtype=torch.float64)
    assert_same(original, fused, x)
    assert set(bnext.fusion_report(fused).fused) == network.fused


class Broadcasting(nn.Module):
    """A residual of one value a channel, as of a squeeze-and-excitation block."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x) + x.mean((2, 3), keepdim=True))


def test_a_residual_that_is_broadcast_is_added_as_before() -> None:
    original = Broadcasting().double()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    assert_same(original, fused, make_input(IMAGE, dtype=torch.float64))
    report = bnext.fusion_report(fused)
    assert (report.fused, report.left) == ([], [("bn", "the residual has another shape, dtype or device")])
