"""Layers of other libraries that `bnext.convert` reaches: timm's `BatchNormAct2d`, frozen batch norms by structure."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from cases import make_input
from fusion.real_models import why_not
from networks import assert_same
from torch import Tensor, nn

import bnext


class FrozenBatchNorm2d(nn.Module):
    """The layer of torchvision and detectron2, which other libraries have copied."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.calls = 0
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


def lookalike(forward: object) -> nn.Module:
    """A layer whose class has the same name and attributes, but another forward."""
    return type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"forward": forward})(3)


def is_ours(output: Tensor) -> bool:
    return output.grad_fn.name() == "BNextBatchNormBackward"


@pytest.fixture
def timm_act() -> type[nn.Module]:
    """The class of timm's layer."""
    if reason := why_not("timm"):
        pytest.skip(reason)
    return importlib.import_module("timm.layers").BatchNormAct2d


def image() -> Tensor:
    return make_input((4, 3, 5, 4), dtype=torch.float64).requires_grad_()


def test_timms_layer_keeps_its_class_drop_layer_and_activation(timm_act: type[nn.Module]) -> None:
    layer = timm_act(3, act_layer=nn.SiLU, drop_layer=nn.Dropout2d).double()
    before = dict(layer.__dict__)
    original = copy.deepcopy(layer)
    assert bnext.convert(layer) is layer
    assert type(layer) is timm_act
    assert_same(original, layer, image().detach())
    seen: list[str] = []
    layer.drop.register_forward_hook(lambda *_: seen.append("drop"))
    layer.act.register_forward_hook(lambda *_: seen.append("act"))
    layer(image())
    assert seen == ["drop", "act"]
    assert is_ours(bnext.convert(timm_act(3, apply_act=False))(torch.randn(2, 3, 2, 2, requires_grad=True)))
    bnext.revert(layer)
    assert layer.__dict__.keys() == before.keys()
    assert type(layer) is timm_act


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_layer_is_known_by_its_structure(training: bool) -> None:
    layer = FrozenBatchNorm2d(3).double().train(training)
    expected = layer(x := image())
    expected.sum().backward()
    assert bnext.convert(layer) is layer
    assert type(layer) is FrozenBatchNorm2d
    calls = layer.calls
    output = layer(y := x.detach().clone().requires_grad_())
    output.sum().backward()
    assert layer.calls == calls
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: torch.relu(FrozenBatchNorm2d.forward(self, x)),
        lambda self, x: x * self.weight.reshape(1, -1, 1, 1),
        lambda self, x: FrozenBatchNorm2d.forward(self, x).flatten(1),
    ],
    ids=["activated", "scale alone", "another shape"],
)
def test_a_lookalike_is_left_alone(forward: object) -> None:
    layer = lookalike(forward)
    state = dict(layer.__dict__)
    bnext.convert(layer)
    assert layer.__dict__.keys() == state.keys()


def test_a_frozen_layer_under_autocast_promotes_as_before() -> None:
    # The layer computes in float32 from a bfloat16 input and float32 buffers; torch's operator would give bfloat16.
    layer = FrozenBatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4).bfloat16()
    expected = layer(x)
    output = bnext.convert(layer)(x)
    assert output.dtype == expected.dtype == torch.float32
    assert torch.equal(output, expected)


def test_copies_pickles_and_replicas_have_a_forward_of_their_own() -> None:
    model = bnext.convert(nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU()))
    x = torch.randn(2, 3, 4, 4)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    replica = model[0]._replicate_for_data_parallel()
    replica._buffers = {name: b.clone() for name, b in model[0]._buffers.items()}
    for twin in (*(t[0] for t in twins), replica):
        twin.running_mean.add_(1)
        assert not torch.equal(twin(x), model[0](x))
        torch.testing.assert_close(twin(x), FrozenBatchNorm2d.forward(twin, x), rtol=1e-5, atol=1e-5)


def test_a_forward_of_the_users_own_stays() -> None:
    layer = FrozenBatchNorm2d(3)
    layer.forward = lambda x: x + 1
    bnext.convert(layer)
    assert torch.equal(layer(torch.zeros(2, 3, 1, 1)), torch.ones(2, 3, 1, 1))


def test_frozen_layers_are_fused() -> None:
    original = nn.Sequential(nn.Conv2d(3, 3, 1), FrozenBatchNorm2d(3), nn.ReLU()).double()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    assert_same(original, fused, image().detach())
    assert bnext.fusion_report(fused).fused == [("1", "batch norm -> relu")]
