"""Each way of writing batch norm, sum and activation down that is met in the field: what is fused, and the results."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_input
from networks import NETWORKS, assert_same

import bnext


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_and_that_it_computes_the_same(name: str) -> None:
    network = NETWORKS[name]
    original = network.make().double()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    x = make_input(network.shape, dtype=torch.float64)
    assert_same(original, fused, x)
    assert set(bnext.fusion_report(fused).fused) == network.fused
