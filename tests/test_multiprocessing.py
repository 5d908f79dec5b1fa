"""A model whose tensors several processes share: a step in another process is seen here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bnext


def network(fuse: bool) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    return bnext.convert(model, fuse=fuse)


def step(model: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(1)
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_step_in_a_spawned_process(fuse: bool) -> None:
    model = network(fuse)
    twin = copy.deepcopy(model)
    model.share_memory()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    process = torch.multiprocessing.get_context("spawn").Process(target=step, args=(model, x))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    step(twin, x)
    for (key, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    assert int(model[1].num_batches_tracked) == 1
