"""ResNet-50 as it is trained, version 1.5: the stride of a bottleneck is that of its 3x3 convolution.

K. He et al., Deep residual learning for image recognition, CVPR 2016; the stride as in Facebook's and NVIDIA's
reference, the initial values as in P. Goyal et al., Accurate, large minibatch SGD, 2017.
"""

import torch
from torch import Tensor, nn

EXPANSION = 4  # channels of a bottleneck's result / those of its 3x3 convolution
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # channels of the 3x3 convolution, blocks, first stride


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Without a bias, which the batch norm behind it would take away again; a padding that keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """(N, inputs, H, W) -> (N, 4 channels, H / stride, W / stride)."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        outputs = EXPANSION * channels
        self.conv1, self.bn1 = conv(inputs, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv(channels, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        output += self.shortcut(input)
        return self.relu(output)


class ResNet50(nn.Module):
    """(N, 3, H, W) -> (N, num_classes), H and W from 32 up. A bottleneck begins as its shortcut."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        blocks: list[nn.Module] = []
        inputs = 64
        for channels, number, stride in STAGES:
            for index in range(number):
                blocks.append(Bottleneck(inputs, channels, stride if index == 0 else 1))
                inputs = EXPANSION * channels
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, input: Tensor) -> Tensor:
        output = self.maxpool(self.relu(self.bn1(self.conv1(input))))
        output = self.avgpool(self.blocks(output))
        return self.fc(torch.flatten(output, 1))
