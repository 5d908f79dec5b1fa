"""The ways an activation behind a batch norm is written: fused, or left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from networks import conv
from observe import QUICK, Net, assert_same_steps, count, fused_names, pair, sequential, small
from torch import Tensor, nn

import bnext

# Activations, and how many of each are fused. Dynamo sees through torch's layers: each is a call of the function of the
# same name.
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "ReLU": (nn.ReLU(), 1),
    "ReLU, in place": (nn.ReLU(inplace=True), 1),
    "ReLU6": (nn.ReLU6(), 1),
    "ReLU6, in place": (nn.ReLU6(inplace=True), 1),
    "LeakyReLU": (nn.LeakyReLU(0.3), 1),
    "LeakyReLU, in place": (nn.LeakyReLU(0.3, inplace=True), 1),
    "LeakyReLU, negative": (nn.LeakyReLU(-0.5), 1),
    "SiLU": (nn.SiLU(), 1),
    "SiLU, in place": (nn.SiLU(inplace=True), 1),
    "GELU": (nn.GELU(), 1),
    "Hardswish": (nn.Hardswish(), 1),
    "Hardswish, in place": (nn.Hardswish(inplace=True), 1),
    "Mish": (nn.Mish(), 1),
    "ELU": (nn.ELU(), 1),
    "GELU, tanh": (nn.GELU(approximate="tanh"), 0),
    "Hardtanh": (nn.Hardtanh(-1.0, 6.0), 0),
    "PReLU": (nn.PReLU(), 0),
    "RReLU": (nn.RReLU(), 0),
    "CELU": (nn.CELU(0.7), 0),
    "Softplus": (nn.Softplus(), 0),
    "Threshold": (nn.Threshold(0.1, -3.0), 0),
    "Sigmoid": (nn.Sigmoid(), 0),
    "Dropout": (nn.Dropout(0.5), 0),
    "Identity": (nn.Identity(), 0),
    "F.relu, in place, by position": (lambda y: F.relu(y, True), 1),
    "F.relu_": (F.relu_, 1),
    "torch.relu": (torch.relu, 1),
    "torch.relu_": (torch.relu_, 1),
    "relu": (lambda y: y.relu(), 1),
    "relu_": (lambda y: y.relu_(), 1),
    "Tensor.relu": (torch.Tensor.relu, 1),
    "F.hardswish, in place, by position": (lambda y: F.hardswish(y, True), 1),
    "F.gelu": (F.gelu, 1),
    "F.leaky_relu": (F.leaky_relu, 1),
    "F.leaky_relu, 0.2, in place, by name": (partial(F.leaky_relu, negative_slope=0.2, inplace=True), 1),
    "F.leaky_relu_": (lambda y: F.leaky_relu_(y, 0.2), 1),
    "F.hardtanh, 0 to 6": (lambda y: F.hardtanh(y, 0.0, 6.0), 1),
    "F.elu_": (lambda y: F.elu_(y), 1),
    "clamp": (lambda y: y.clamp(min=0), 0),
    "clamp_": (lambda y: y.clamp_(0, 6), 0),
    "maximum": (lambda y: torch.maximum(y, torch.zeros_like(y)), 0),
    "y * sigmoid(y)": (lambda y: y * y.sigmoid(), 0),
    "relu of a view": (lambda y: F.relu(y.flatten(1)), 0),
    "relu of a transpose": (lambda y: F.relu(y.transpose(2, 3)), 0),
    "relu of another dtype": (lambda y: F.relu(y.float()), 0),
    "relu of the negative": (lambda y: F.relu(-y), 0),
}


class Followed(Net):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def test_each_form_of_an_activation_is_fused_as_listed_and_computes_the_same() -> None:
    assert failures({name: Pattern(Followed(act), pairs) for name, (act, pairs) in FORMS.items()}, QUICK) == {}


@pytest.mark.parametrize("slope", [0.3, 0.7, -0.5])
def test_slopes_of_one_model_do_not_affect_the_next(slope: float) -> None:
    """Dynamo turns a number that has changed into a variable, also where two models share the code."""
    original, fused = pair(lambda: sequential(conv(3, 1), act=nn.LeakyReLU(slope)))
    assert_same_steps(original, fused, small(), modes=("training",))
    assert bnext.fusion_report(fused).fused == [("1", f"batch norm -> leaky_relu({slope})")]


def test_the_report_names_the_layer_and_the_activation() -> None:
    original, fused = pair(lambda: sequential(conv(3, 1), nn.BatchNorm2d(3), nn.GELU("tanh"), act=nn.Hardswish()))
    assert_same_steps(original, fused, small(), modes=("training",))
    ((name, what),) = bnext.fusion_report(fused).fused
    assert (name, what.endswith("-> hardswish")) == ("1", True)
    ((name, why),) = bnext.fusion_report(fused).left
    assert (name, "gelu" in why) == ("4", True)
    assert all(text in str(bnext.fusion_report(fused)) for text in ("1: ", what, "4: ", why))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_rank_and_layout_is_fused_and_kept(dim: int, channels_last: bool) -> None:
    shape = (4, 3) if dim == 1 else (2, 3, 4, 5, 3)[: dim + 2]
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    cls = getattr(nn, f"BatchNorm{dim}d")
    original, fused = pair(lambda: nn.Sequential(cls(3), nn.SiLU(), cls(3)))
    assert_same_steps(original, fused, x)
    assert fused_names(fused) == ["0"]
    assert fused(x).stride() == original(x).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_are_fused_too(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(dtype)
    fused = bnext.convert(model, fuse=True)
    x = torch.randn(4, 3, 5, 5).to(dtype).requires_grad_()
    y = fused(x)
    assert y.dtype == dtype
    assert count(y) == 0
    # A rectified value is rounded once either way.
    assert torch.equal(y, fused[1](fused[0](x)))


def test_settings_of_layers_are_kept() -> None:
    settings = (
        {"eps": 0.1}, {"momentum": None}, {"momentum": 0.5}, {"affine": False}, {"track_running_stats": False},
    )  # fmt: skip
    for keywords in settings:
        original, fused = pair(lambda k=keywords: nn.Sequential(nn.BatchNorm2d(3, **k), nn.ReLU(), conv(3, 1)))
        assert_same_steps(original, fused, small(), modes=("training", "evaluation"))
        assert fused_names(fused) == ["0"], keywords
