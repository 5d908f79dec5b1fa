"""Options by which a layer departs from torch's: one value a channel, forwards in backward, ghost batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import make_input
from checkpoint_kinds import KINDS
from marks import FLAGS, each
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnext


def pooled() -> nn.Sequential:
    """ASPP's branch of image features: a batch of one image has one value a channel in its batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


@each(fuse=FLAGS)
def test_one_value_a_channel_takes_the_running_statistics(fuse: bool) -> None:
    model = bnext.convert(pooled(), fuse=fuse, single_value="running")
    model(make_input((6, 3, 5, 5)))
    theirs = pooled()
    theirs.load_state_dict(model.state_dict())
    x = make_input((1, 3, 5, 5)).requires_grad_()
    y, expected = model(x), theirs.eval()(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(t.sum(), x) for t in (y, expected)))
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    model(make_input((2, 3, 5, 5)))
    assert model[2].num_batches_tracked == 2
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bnext.revert(model)(x)


def test_single_value_may_be_set_as_an_attribute() -> None:
    layer, x = bnext.BatchNorm1d(3), make_input((1, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)
    layer.single_value = "running"
    assert copy.deepcopy(layer)(x).shape == (1, 3)
    layer.single_value = "mean"
    with pytest.raises(ValueError, match="expected single_value to be \"running\" or None, but got 'mean'"):
        layer(x)
    layer = bnext.BatchNorm1d(3, track_running_stats=False)
    layer.single_value = "running"  # without running statistics it has no effect
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(x)


def block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
@each(fuse=FLAGS)
@each(sync=FLAGS)
def test_a_checkpointed_batch_counts_once(kind: str, fuse: bool, sync: bool) -> None:
    expected, x = block(), make_input((4, 3, 7, 7))
    gradients = {}
    for update in (None, True, False):
        model, leaf = block(), x.clone().requires_grad_()
        if update is None:
            expected, y = model, model(leaf)
        else:
            bnext.convert(model, fuse=fuse, sync=sync, update_in_backward=update)
            y = checkpoint(model, leaf, **KINDS[kind])
        y.square().sum().backward()
        gradients[update] = [leaf.grad, *(p.grad for p in model.parameters())]
        assert model[1].num_batches_tracked == (2 if update else 1)
    torch.testing.assert_close(model[1].running_var, expected[1].running_var)
    torch.testing.assert_close(gradients[False], gradients[None], rtol=1e-4, atol=1e-5)


def test_forwards_outside_of_backward_count() -> None:
    model = bnext.convert(block(), update_in_backward=False)
    for _ in range(2):
        model(make_input((4, 3, 7, 7))).sum().backward()
    assert model[1].num_batches_tracked == 2
    assert bnext.revert(model)[1].__dict__.get("update_in_backward") is None


@each(fuse=FLAGS)
def test_ghost_batches_of_a_whole_model(fuse: bool) -> None:
    model = bnext.convert(block(), fuse=fuse, virtual_batch_size=2)
    layer_by_layer = bnext.convert(block())
    layer_by_layer[1].virtual_batch_size = 2
    x = make_input((5, 3, 7, 7))
    assert torch.allclose(model(x), layer_by_layer(x), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == layer_by_layer[1].num_batches_tracked == 3
    bnext.convert(model)  # a conversion without the option leaves it as it is
    model(x)
    assert model[1].num_batches_tracked == 6
    bnext.revert(model)(x)
    assert model[1].num_batches_tracked == 7


@pytest.mark.parametrize(
    ("size", "sync", "error", "message"),
    [
        (0, False, ValueError, r"expected virtual_batch_size to be at least 1 and below 2\*\*63, but got 0"),
        (True, False, TypeError, "expected virtual_batch_size to be an int or None, but got True"),
        (2.0, False, TypeError, "expected virtual_batch_size to be an int or None, but got 2.0"),
        (2, True, ValueError, "expected no virtual_batch_size with synchronised layers, .* but got 2"),
    ],
)
def test_bad_virtual_batch_sizes_are_refused(size: Any, sync: bool, error: type[Exception], message: str) -> None:
    model = block()
    with pytest.raises(error, match=message):
        bnext.convert(model, sync=sync, virtual_batch_size=size)
    assert type(model[1]) is nn.BatchNorm2d
    assert "forward" not in model[1].__dict__
    assert "virtual_batch_size" not in model[1].__dict__


def test_synchronised_layers_have_no_ghost_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="expected no virtual_batch_size with synchronised layers"):
        bnext.convert(model, virtual_batch_size=2)
    assert type(model[1]) is nn.SyncBatchNorm
