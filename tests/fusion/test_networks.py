"""Each way of writing batch norm, sum and activation down that is met in the field: what is fused, and the results."""

from __future__ import annotations

import pytest
import torch
from cases import make_input
from networks import IMAGE, NETWORKS, assert_same
from observe import Net, pair, why_left

import bnext


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_and_that_it_computes_the_same(name: str) -> None:
    network = NETWORKS[name]
    original, fused = pair(network.make)
    x = make_input(network.shape, dtype=torch.float64)
    assert_same(original, fused, x)
    assert set(bnext.fusion_report(fused).fused) == network.fused


def test_a_residual_that_is_broadcast_is_added_as_before() -> None:
    """The residual has one value a channel, as in a squeeze-and-excitation block."""
    original, fused = pair(Net.with_forward(lambda self, x: torch.relu(self.bn(x) + x.mean((2, 3), keepdim=True))))
    assert_same(original, fused, make_input(IMAGE, dtype=torch.float64))
    assert bnext.fusion_report(fused).fused == []
    assert why_left(fused, "bn") == "the residual has another shape, dtype or device"
