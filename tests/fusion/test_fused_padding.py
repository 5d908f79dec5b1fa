"""A batch norm with padding is fused with its activation, which is 0 at 0, but not with a sum, which may not be 0 at
padding."""

from __future__ import annotations

import torch
from batches import make_padded
from torch import Tensor, nn

import bnext


class Block(nn.Module):
    def __init__(self, has_residual: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.has_residual = has_residual

    def forward(self, x: Tensor, lengths: Tensor, residual: Tensor) -> Tensor:
        y = self.bn(x, lengths=lengths)
        return torch.relu(y + residual if self.has_residual else y)


def call(has_residual: bool) -> tuple[Block, Tensor, Tensor]:
    """A block that is converted and called, its output, and the expected output."""
    lengths = torch.tensor([4, 2, 0])
    valid = torch.arange(4) < lengths[:, None]
    model = bnext.convert(Block(has_residual), fuse=True)
    x, residual = make_padded((3, 3, 4), valid), torch.ones(3, 3, 4)
    y = model(x, lengths, residual)
    alone = bnext.functional.batch_norm(x, None, None, training=True, lengths=lengths)
    return model, y, torch.relu(alone + residual if has_residual else alone)


def test_an_activation_behind_padding_is_fused() -> None:
    model, y, expected = call(has_residual=False)
    assert torch.allclose(y, expected, atol=1e-6)
    assert dict(bnext.fusion_report(model).fused) == {"bn": "batch norm -> relu"}


def test_a_sum_behind_padding_is_not_fused() -> None:
    model, y, expected = call(has_residual=True)
    assert torch.allclose(y, expected, atol=1e-6)
    assert dict(bnext.fusion_report(model).left) == {"bn": "followed by a sum that is not 0 at padding"}
