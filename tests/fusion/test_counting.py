"""counting.py itself, by which tests know what is fused: on networks small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from counting import count, count_norms, count_pairs
from observe import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.functional import batch_norm_act

# Activations that batch norm cannot apply.
OTHERS = (
    torch.sigmoid, torch.tanh, F.hardsigmoid, F.hardtanh, F.selu, F.celu, F.softplus,
    lambda y: F.gelu(y, approximate="tanh"), lambda y: y.clamp(min=0),
)  # fmt: skip


def image() -> Tensor:
    return torch.randn(2, 3, 4, 4, requires_grad=True)


@pytest.mark.parametrize("act", OTHERS)
def test_other_functions_are_not_counted(act: Callable[[Tensor], Tensor]) -> None:
    output = act(Net().bn(image()))
    assert (count(output), count_pairs(output)) == (0, 0)


@pytest.mark.parametrize(
    ("forward", "pairs"),
    [
        (lambda self, x: F.relu(self.bn(x) + x), 1),
        (lambda self, x: F.relu(x + self.bn(x)), 1),
        (lambda self, x: F.relu(self.bn(x) + self.bn2(x)), 1),
        (lambda self, x: self.bn(x).add_(x).relu_(), 1),
        (lambda self, x: F.relu_((x * 2).add_(self.bn(x))), 1),
        (lambda self, x: (F.relu((y := self.bn(x)) + self.bn2(x)), y), 1),
        (lambda self, x: F.relu(x * 2 + x + self.bn(x)), 1),
        (lambda self, x: F.relu(self.bn(self.conv(F.relu(self.bn(x))))), 2),
        (lambda self, x: checkpoint(lambda z: F.relu(self.bn(z)), x, use_reentrant=False), 1),
        (lambda self, x: F.silu(self.bn2(F.relu(self.bn(x)))), 2),
        (lambda self, x: F.relu(F.relu(self.bn(x))), 1),
        # In these forwards nothing could be fused.
        (lambda self, x: F.relu(self.bn(x) + x + x * 2), 0),
        (lambda self, x: F.relu(y := self.bn(x)) * torch.sigmoid(y), 0),
        (lambda self, x: (F.relu(y := self.bn(x)), y), 0),
        (lambda self, x: {"out": F.relu(y := self.bn(x) + x), "sum": y}, 0),
        (lambda self, x: (y := self.bn(x)) * 2 + F.relu_(y), 0),
        (lambda self, x: self.bn(x), 0),
        (lambda self, x: F.relu(self.conv(self.bn(x))), 0),
        (lambda self, x: F.relu(torch.add(x, self.bn(x), alpha=2)), 0),
        (lambda self, x: F.relu(self.bn(x) + 1), 0),
        (lambda self, x: F.relu(self.bn(x) * x), 0),
        (lambda self, x: F.relu(self.bn(x) + x.mean((2, 3), keepdim=True)), 0),
        (lambda self, x: F.relu(self.bn(x[:1]) + x), 0),
        (lambda self, x: F.relu(self.bn(x) - x), 0),
    ],
)
def test_count_pairs_counts_what_could_be_fused(forward: Callable[[Net, Tensor], object], pairs: int) -> None:
    assert count_pairs(Net.with_forward(forward)()(image())) == pairs


def test_count_norms_tells_bnexts_batch_norms_from_torchs() -> None:
    model = nn.Sequential(bnext.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU())
    assert count_norms(model(image())) == (2, 1)


def test_a_fused_activation_is_not_counted() -> None:
    bn = nn.BatchNorm2d(3)
    output = batch_norm_act(image(), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)
    assert (count(F.silu(output)), count_norms(output)) == (1, (1, 1))
