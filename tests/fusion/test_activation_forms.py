"""The ways an activation behind a batch norm is written, each in every mode: fused, or left with a reason."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from networks import conv
from observe import MODES, Net, assert_fuses, assert_same_steps, count, fused_names, pair, sequential, small
from torch import Tensor, nn

import bnext
from bnext.activations import NAMES

MODULES: dict[str, tuple[nn.Module, str | None]] = {
    "ReLU": (nn.ReLU(), "relu"),
    "ReLU, in place": (nn.ReLU(inplace=True), "relu"),
    "ReLU6": (nn.ReLU6(), "relu6"),
    "ReLU6, in place": (nn.ReLU6(inplace=True), "relu6"),
    "LeakyReLU": (nn.LeakyReLU(0.3), "leaky_relu(0.3)"),
    "LeakyReLU, in place": (nn.LeakyReLU(0.3, inplace=True), "leaky_relu(0.3)"),
    "LeakyReLU, negative": (nn.LeakyReLU(-0.5), "leaky_relu(-0.5)"),
    "SiLU": (nn.SiLU(), "silu"),
    "SiLU, in place": (nn.SiLU(inplace=True), "silu"),
    "GELU": (nn.GELU(), "gelu"),
    "Hardswish": (nn.Hardswish(), "hardswish"),
    "Hardswish, in place": (nn.Hardswish(inplace=True), "hardswish"),
    "Mish": (nn.Mish(), "mish"),
    "ELU": (nn.ELU(), "elu"),
    "GELU, tanh": (nn.GELU(approximate="tanh"), None),
    "Hardtanh": (nn.Hardtanh(-1.0, 6.0), None),
    "PReLU": (nn.PReLU(), None),
    "RReLU": (nn.RReLU(), None),
    "CELU": (nn.CELU(0.7), None),
    "Softplus": (nn.Softplus(), None),
    "Threshold": (nn.Threshold(0.1, -3.0), None),
    "Sigmoid": (nn.Sigmoid(), None),
    "Dropout": (nn.Dropout(0.5), None),
    "Identity": (nn.Identity(), None),
}


def known(act: str | None) -> bool:
    return act is not None and act.partition("(")[0] in NAMES


class Followed(Net):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def test_modules() -> None:
    patterns = {name: Pattern(Followed(act), pairs=known(expected)) for name, (act, expected) in MODULES.items()}
    assert failures(patterns, modes=tuple(MODES)) == {}


@pytest.mark.parametrize("slope", [0.3, 0.7, -0.5])
def test_slopes_of_one_model_are_nothing_to_the_next(slope: float) -> None:
    """Dynamo makes a number a variable once it has changed; the models of a process share the code that calls them."""
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


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "F.relu": (F.relu, "relu"),
    "F.relu, in place": (partial(F.relu, inplace=True), "relu"),
    "F.relu, in place, by position": (lambda y: F.relu(y, True), "relu"),
    "F.relu_": (F.relu_, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.relu_": (torch.relu_, "relu"),
    "relu": (lambda y: y.relu(), "relu"),
    "relu_": (lambda y: y.relu_(), "relu"),
    "Tensor.relu": (torch.Tensor.relu, "relu"),
    "F.silu": (F.silu, "silu"),
    "F.silu, in place": (partial(F.silu, inplace=True), "silu"),
    "F.hardswish": (F.hardswish, "hardswish"),
    "F.hardswish, in place": (lambda y: F.hardswish(y, True), "hardswish"),
    "F.gelu": (F.gelu, "gelu"),
    "F.gelu, none": (partial(F.gelu, approximate="none"), "gelu"),
    "F.gelu, tanh": (partial(F.gelu, approximate="tanh"), None),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu(0.01)"),
    "F.leaky_relu, 0.2": (lambda y: F.leaky_relu(y, 0.2), "leaky_relu(0.2)"),
    "F.leaky_relu, 0.2, in place": (partial(F.leaky_relu, negative_slope=0.2, inplace=True), "leaky_relu(0.2)"),
    "F.leaky_relu, 0.2, True": (lambda y: F.leaky_relu(y, 0.2, True), "leaky_relu(0.2)"),
    "F.leaky_relu_": (lambda y: F.leaky_relu_(y, 0.2), "leaky_relu(0.2)"),
    "F.relu6": (F.relu6, "relu6"),
    "F.hardtanh, 0 to 6": (lambda y: F.hardtanh(y, 0.0, 6.0), "relu6"),
    "F.mish": (F.mish, "mish"),
    "F.elu": (F.elu, "elu"),
    "F.elu, 0.3": (lambda y: F.elu(y, 0.3), "elu"),
    "F.elu_": (lambda y: F.elu_(y), "elu"),
    "clamp": (lambda y: y.clamp(min=0), None),
    "clamp_": (lambda y: y.clamp_(0, 6), None),
    "maximum": (lambda y: torch.maximum(y, torch.zeros_like(y)), None),
    "y * sigmoid(y)": (lambda y: y * y.sigmoid(), None),
    "relu of a view": (lambda y: F.relu(y.flatten(1)), None),
    "relu of a transpose": (lambda y: F.relu(y.transpose(2, 3)), None),
    "relu of another dtype": (lambda y: F.relu(y.float()), None),
    "relu of the negative": (lambda y: F.relu(-y), None),
}


def test_functions() -> None:
    def behind(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda self, x, r: function(self.bn(self.conv(x)))

    patterns = {name: Pattern(behind(f), pairs=known(expected)) for name, (f, expected) in FUNCTIONS.items()}
    assert failures(patterns, modes=tuple(MODES)) == {}


@pytest.mark.parametrize("inplace", [False, True])
def test_one_activation_module_for_all(inplace: bool) -> None:
    act = nn.ReLU(inplace)
    original, fused = pair(lambda: nn.Sequential(conv(3), nn.BatchNorm2d(3), act, conv(3), nn.BatchNorm2d(3), act))
    assert_same_steps(original, fused, small())
    assert fused_names(fused) == ["1", "4"]
    assert_fuses(original.train(), fused.train(), small(), pairs=2)


def test_one_batch_norm_for_two_activations() -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(F.relu(self.bn(x)))))

    original, fused = pair(Net.of(forward))
    assert_same_steps(original, fused, small())
    assert len({what for name, what in bnext.fusion_report(fused).fused if name == "bn"}) == 2
    assert_fuses(original.train(), fused.train(), small(), pairs=2)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_rank_and_layout(dim: int, channels_last: bool) -> None:
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
