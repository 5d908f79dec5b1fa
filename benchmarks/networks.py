"""Networks with batch norm: a small ResNet, segmentation, a GAN, point clouds."""

from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

EXPANSION = 4  # channels of a bottleneck / those of its 3x3 convolution


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without a bias, which the batch norm after it would cancel; its padding keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """ResNet-50's block, (N, channels, H, W) -> (N, channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // EXPANSION
        self.conv1, self.bn1 = conv(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, channels, 1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        output += input
        return self.relu(output)


class BasicBlock(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride), stride = outputs / inputs; the shortcut has no
    weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.added = outputs // inputs, outputs - inputs
        self.conv1, self.bn1 = conv(inputs, outputs, 3, self.stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)

    def forward(self, input: Tensor) -> Tensor:
        output = F.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        shortcut = input
        if self.added:
            channels = (self.added // 2, self.added // 2)
            shortcut = F.pad(input[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *channels))
        return F.relu(output + shortcut)


class ResNet20(nn.Module):
    """(N, 3, 32, 32) -> (N, 10): K. He et al., CVPR 2016, section 4.2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.blocks = nn.Sequential(*map(BasicBlock, widths[:-1], widths[1:]))
        self.fc = nn.Linear(64, 10)

    def forward(self, input: Tensor) -> Tensor:
        output = self.blocks(F.relu(self.bn1(self.conv1(input))))
        return self.fc(output.mean((2, 3)))


def twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        *(conv(outputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """(N, 3, H, W) -> (N, 2, H, W), H and W multiples of 8: O. Ronneberger et al., MICCAI 2015, padded and narrower."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(twice, (3, *widths), widths))
        narrower, wider = widths[-2::-1], widths[:0:-1]
        self.grow = nn.ModuleList(nn.ConvTranspose2d(w, n, 2, 2) for w, n in zip(wider, narrower, strict=True))
        self.up = nn.ModuleList(twice(2 * n, n) for n in narrower)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, input: Tensor) -> Tensor:
        *levels, output = self.down
        kept = []
        for level in levels:
            input = level(input)
            kept.append(input)
            input = F.max_pool2d(input, 2)
        input = output(input)
        for grow, up in zip(self.grow, self.up, strict=True):
            input = up(torch.cat([kept.pop(), grow(input)], 1))
        return self.head(input)


def discriminator(width: int = 64) -> nn.Sequential:
    """(N, 3, 64, 64) -> (N, 1, 1, 1): A. Radford et al., DCGAN, ICLR 2016."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for inputs in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(inputs, 2 * inputs, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * inputs),
            nn.LeakyReLU(0.2, inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, bias=False))


def perceptron(layer: Callable[[int, int], nn.Module], *widths: int) -> nn.Sequential:
    """Linear layers or convolutions of width 1, each followed by a batch norm and a ReLU."""
    blocks = ((layer(i, o), nn.BatchNorm1d(o), nn.ReLU(inplace=True)) for i, o in pairwise(widths))
    return nn.Sequential(*chain.from_iterable(blocks))


# `points` treats each point of a cloud alike; `dense` takes the features of a cloud.
points = partial(perceptron, partial(nn.Conv1d, kernel_size=1))
dense = partial(perceptron, nn.Linear)


class Transform(nn.Module):
    """The square matrix that each cloud is multiplied by."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.points, self.dense = points(size, 64, 128, 1024), dense(1024, 512, 256)
        self.last = nn.Linear(256, size * size)

    def forward(self, input: Tensor) -> Tensor:
        size = input.shape[1]
        found = self.last(self.dense(self.points(input).amax(2))).view(-1, size, size)
        return found + torch.eye(size, dtype=found.dtype, device=found.device)


class PointNet(nn.Module):
    """(N, 3, points) -> (N, 40), the classifier: C. Qi et al., CVPR 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.align = Transform(3), Transform(64)
        self.first, self.second = points(3, 64, 64), points(64, 64, 128, 1024)
        self.head = nn.Sequential(dense(1024, 512, 256), nn.Dropout(0.3), nn.Linear(256, 40))

    def forward(self, input: Tensor) -> Tensor:
        output = self.first(self.turn(input) @ input)
        return self.head(self.second(self.align(output) @ output).amax(2))
