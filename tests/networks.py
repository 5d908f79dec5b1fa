"""Small networks, each with one way in which batch norm, sum and activation are written in the field,
and the comparison of a fused network with its original."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from cases import make_grad, make_input, seed
from tolerances import assert_within
from torch import Tensor, nn


def conv(channels: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)


class Net(nn.Module):
    """A module with these modules, by name."""

    def __init__(self, **modules: nn.Module | None) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Basic(nn.Module):
    """torchvision's block: one in-place ReLU for all, a sum in place, an optional Sequential beside."""

    def __init__(self, channels: int = 4, downsample: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(channels), nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(conv(channels, 1), nn.BatchNorm2d(channels)) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.bn3 = conv(4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A helper calls the stem, and the blocks, which lie in plain Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Basic(), Basic(downsample=False))
        self.layer2 = nn.Sequential(Bottleneck())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.pool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


class Sides(Net):
    """Both operands of the sum are Sequentials, the activation is a function."""

    def __init__(self) -> None:
        left = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), conv(4), nn.BatchNorm2d(4)
        super().__init__(left=nn.Sequential(*left), shortcut=nn.Sequential(nn.Conv2d(3, 4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.left(x)
        out += self.shortcut(x)
        return F.relu(out)


class TwoNorms(Net):
    """Both operands are batch norms; the later one is fused."""

    def __init__(self) -> None:
        super().__init__(conv=nn.Conv2d(3, 4, 3, padding=1), bn=nn.BatchNorm2d(4))
        self.down, self.down_bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)) + self.down_bn(self.down(x)))


class PreActivation(Net):
    def __init__(self) -> None:
        super().__init__(
            bn1=nn.BatchNorm2d(3), conv1=conv(3), bn2=nn.BatchNorm2d(3), conv2=conv(3), shortcut=conv(3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(3), nn.ReLU(inplace=True), conv(3)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(6), nn.ReLU(inplace=True), conv(6)
        self.norm3 = nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        features.append(self.conv1(self.relu1(self.norm1(torch.cat(features, 1)))))
        x = torch.cat(features, 1)
        x = torch.cat([x, self.conv2(self.relu2(self.norm2(x)))], 1)
        return self.norm3(x).relu_().mean((2, 3))


class Gate(Net):
    def __init__(self) -> None:
        super().__init__(pool=nn.AdaptiveAvgPool2d(1), fc=conv(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.fc(self.pool(x))) * x


class Mobile(nn.Module):
    """MobileNetV3's inverted residual: a gate in between, and no activation behind the last batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Hardswish(inplace=True)),
            nn.Sequential(conv(4), nn.BatchNorm2d(4), nn.Hardswish(inplace=True)),
            Gate(),
            nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)),
        )

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        result += x
        return result


class SharedSame(Net):
    def __init__(self) -> None:
        super().__init__(conv=conv(3), bn=nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(F.relu(self.bn(x), inplace=True))))


class SharedDifferent(SharedSame):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.bn(self.conv(F.relu(self.bn(x)))))


class Functional(nn.Module):
    """pytorch#122070: parameters and statistics are the module's own."""

    def __init__(self) -> None:
        super().__init__()
        for i in (1, 2, 3):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.rand(3) + 0.5))
            self.register_parameter(f"bias{i}", nn.Parameter(torch.randn(3)))
            self.register_buffer(f"mean{i}", torch.zeros(3))
            self.register_buffer(f"var{i}", torch.ones(3))
        self.conv = conv(3)

    def forward(self, input: Tensor) -> Tensor:
        out = F.batch_norm(input, self.mean1, self.var1, self.weight1, self.bias1, self.training, 0.2, 1e-3)
        out = self.conv(F.leaky_relu(out, 0.2))
        out = F.batch_norm(out, self.mean2, self.var2, weight=self.weight2, bias=self.bias2, training=self.training)
        out = F.relu(torch.add(input, out))
        return F.batch_norm(out, self.mean3, self.var3, self.weight3, self.bias3, training=self.training)


class Branching(Net):
    """Outside of the Sequential, control flow depends on the input."""

    def __init__(self) -> None:
        super().__init__(body=nn.Sequential(conv(3), nn.BatchNorm2d(3), nn.LeakyReLU(0.1)), bn=nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return F.relu(self.bn(x)) if x.sum() > 0 else F.relu(-self.bn(x))


class OwnNorm(nn.BatchNorm2d):
    """A user's subclass, with another forward."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class WithOwnNorm(Net):
    def __init__(self) -> None:
        super().__init__(bn=nn.BatchNorm2d(3), own=OwnNorm(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.bn(x).relu()).relu()


class Line(Net):
    """1d batch norms, of features and of a sequence."""

    def __init__(self) -> None:
        super().__init__(bn1=nn.BatchNorm1d(3), fc1=nn.Linear(3, 3), fc2=nn.Linear(3, 3), bn2=nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc1(F.gelu(self.bn1(x)).mean(-1))
        return F.relu(self.bn2(self.fc2(out)).add(out))


class Volume(Net):
    def __init__(self) -> None:
        super().__init__(conv=nn.Conv3d(3, 3, 3, padding=1), bn=nn.BatchNorm3d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out = self.bn(self.conv(x))
        out = x + out
        return F.hardswish(out)


IMAGE = (3, 3, 5, 4)


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    fused: set[tuple[str, str]]  # the name of each batch norm that is fused, and how
    shape: tuple[int, ...] = IMAGE


NETWORKS = {
    "resnet": Network(
        ResNet,
        {
            ("bn1", "batch norm -> relu"),
            ("layer1.0.bn1", "batch norm -> relu"),
            ("layer1.0.bn2", "batch norm + residual -> relu"),
            ("layer1.1.bn1", "batch norm -> relu"),
            ("layer1.1.bn2", "batch norm + residual -> relu"),
            ("layer2.0.bn1", "batch norm -> relu"),
            ("layer2.0.bn2", "batch norm -> relu"),
            ("layer2.0.downsample.1", "batch norm + residual -> relu"),
        },
    ),
    "sides": Network(Sides, {("left.1", "batch norm -> relu"), ("left.4", "batch norm + residual -> relu")}),
    "two norms": Network(TwoNorms, {("bn", "batch norm + residual -> silu")}),
    "pre-activation": Network(PreActivation, {("bn1", "batch norm -> relu"), ("bn2", "batch norm -> relu")}),
    "dense": Network(
        Dense, {("norm1", "batch norm -> relu"), ("norm2", "batch norm -> relu"), ("norm3", "batch norm -> relu")}
    ),
    "mobile": Network(Mobile, {("block.0.1", "batch norm -> hardswish"), ("block.1.1", "batch norm -> hardswish")}),
    "shared, same": Network(SharedSame, {("bn", "batch norm -> relu")}),
    "shared, different": Network(SharedDifferent, {("bn", "batch norm -> relu"), ("bn", "batch norm -> gelu")}),
    "functional": Network(
        Functional,
        {
            ("(the module itself)", "batch norm -> leaky_relu(0.2)"),
            ("(the module itself)", "batch norm + residual -> relu"),
        },
    ),
    "branching": Network(Branching, {("body.1", "batch norm -> leaky_relu(0.1)"), ("bn", "batch norm -> relu")}),
    "own norm": Network(WithOwnNorm, {("bn", "batch norm -> relu")}),
    "line": Network(Line, {("bn1", "batch norm -> gelu"), ("bn2", "batch norm + residual -> relu")}, (4, 3, 5)),
    "volume": Network(Volume, {("bn", "batch norm + residual -> hardswish")}, (2, 3, 3, 2, 2)),
}


def assert_close(actual: object, expected: object, what: str) -> None:
    """Allow for eight normalisations in a row in float64, forward and backward, each of which may amplify rounding by
    the ratio of a value to its standard deviation."""
    if isinstance(expected, (tuple, list, dict)):
        assert type(actual) is type(expected), what
        values = [list(v.values()) if isinstance(v, dict) else v for v in (actual, expected)]
        for a, b in zip(*values, strict=True):
            assert_close(a, b, what)
    elif isinstance(expected, Tensor) and expected.is_floating_point():
        assert isinstance(actual, Tensor), what
        assert actual.dtype == expected.dtype, what
        wide = expected.detach().double()
        assert_within(actual, wide, 1e-11 * (1 + (wide.abs().max() if wide.numel() else 0.0)), what)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected), what
    else:
        assert actual == expected, what


def run(model: nn.Module, inputs: tuple[object, ...], training: bool) -> dict[str, object]:
    """Run forward and, where the output requires a gradient, backward; return all results by name."""
    seed(17)
    random.seed(17)
    model.train(training).zero_grad()
    leaves = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    # A clone is no leaf, so that a model may change it in place.
    output = model(*(x.clone() if isinstance(x, Tensor) else x for x in leaves))
    if isinstance(output, Tensor) and output.requires_grad:
        output.backward(make_grad(tuple(output.shape), dtype=output.dtype))
    return {
        "output": output.detach() if isinstance(output, Tensor) else output,
        "input gradients": [x.grad if x.grad is not None else 0 for x in leaves if isinstance(x, Tensor)],
        **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def assert_same(original: nn.Module, fused: nn.Module, *inputs: object) -> None:
    """Compare two steps in training and one in evaluation: outputs, all gradients, running statistics and counters."""
    for training in (True, True, False):
        expected, actual = run(original, inputs, training), run(fused, inputs, training)
        assert list(actual) == list(expected)
        for what, value in expected.items():
            assert_close(actual[what], value, what)


def random_input(*shape: int) -> Tensor:
    return make_input(shape or IMAGE, dtype=torch.float64)


def saved(model: nn.Module) -> nn.Module:
    """A model that was written to a file as a whole, and read again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
