"""State as torch's layers take it: counters of any kind, averaged state_dicts, parameters of another shape."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import make_input
from torch import nn

import bnext

COUNTERS = (torch.int64, torch.int32, torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", COUNTERS, ids=str)
def test_a_counter_counts_in_its_dtype(dtype: torch.dtype, momentum: float | None) -> None:
    layers = [make(3, momentum=momentum) for make in (nn.BatchNorm2d, bnext.BatchNorm2d)]
    for layer in layers:
        layer.num_batches_tracked = layer.num_batches_tracked.to(dtype)
    for _ in range(3):
        x = make_input((4, 3, 2, 2))
        for layer in layers:
            layer(x)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


def test_a_counter_of_another_dtype_does_not_count_a_call_that_fails() -> None:
    layer = bnext.BatchNorm2d(3)
    layer.num_batches_tracked = layer.num_batches_tracked.float()
    with pytest.raises(RuntimeError, match="should contain 4 elements"):
        layer(make_input((2, 4, 2, 2)))
    assert layer.num_batches_tracked == 0


def test_statistics_are_updated_with_a_counter_on_another_device() -> None:
    layer, ordinary = bnext.BatchNorm2d(3), bnext.BatchNorm2d(3)
    layer.num_batches_tracked = layer.num_batches_tracked.to("meta")
    x = make_input((4, 3, 2, 2))
    layer(x)
    ordinary(x)
    assert torch.equal(layer.running_mean, ordinary.running_mean)
    assert torch.equal(layer.running_var, ordinary.running_var)


def test_an_averaged_state_dict_is_assigned() -> None:
    layers = [nn.BatchNorm2d(3), bnext.BatchNorm2d(3)]
    averaged = {name: (t.float() + t.float() + 1) / 2 for name, t in layers[0].state_dict().items()}
    x = make_input((4, 3, 2, 2))
    for layer in layers:
        layer.load_state_dict(copy.deepcopy(averaged), assign=True)
        layer(x)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


@pytest.mark.parametrize("act", [None, "relu", "gelu"])
def test_parameters_and_statistics_may_have_any_shape_of_as_many_values(act: bnext.modules.Act) -> None:
    plain, shaped = (bnext.BatchNormAct2d(3, act=act) for _ in range(2))
    for name in ("weight", "bias"):
        setattr(shaped, name, nn.Parameter(getattr(shaped, name).detach().view(1, 3, 1, 1)))
    for name in ("running_mean", "running_var"):
        setattr(shaped, name, getattr(shaped, name).view(3, 1))
    x = make_input((4, 3, 2, 2))
    for training in (True, False):
        outputs = [layer.train(training)(x) for layer in (plain, shaped)]
        for y in outputs:
            y.exp().sum().backward()
        assert torch.equal(*outputs)
    assert shaped.bias.grad.shape == (1, 3, 1, 1)
    for a, b in ((plain.weight.grad, shaped.weight.grad), (plain.bias.grad, shaped.bias.grad)):
        assert torch.equal(a, b.flatten())
    assert torch.equal(plain.running_var, shaped.running_var.flatten())
    with pytest.raises(RuntimeError, match="weight should contain 3 elements not 4"):
        bnext.functional.batch_norm(x, None, None, torch.ones(2, 2), training=True)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "silu", "gelu"])
def test_a_bias_may_change_between_forward_and_backward(act: str) -> None:
    """torch's batch norm saves no bias, so an optimiser of biases alone may step between two backward calls."""
    layer = bnext.BatchNormAct2d(3, act=act).double()
    layer.weight.requires_grad_(False)
    twin = copy.deepcopy(layer)
    x = make_input((4, 3, 2, 2), dtype=torch.float64)
    losses = [layer(x).square().sum() for _ in range(2)]
    losses[0].backward()
    with torch.no_grad():
        layer.bias.add_(1)
    losses[1].backward()
    for _ in range(2):
        twin(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
