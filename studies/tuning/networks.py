"""The network: three layers of sigmoids, with or without bnext's batch norm between linear map and sigmoid."""

import math

import torch
from torch import nn

import bnext
from studies.tuning.digits import CLASSES
from studies.tuning.settings import Point

PIXELS = 64
WIDTH = 100  # of each of the three layers, as in figure 1 of Ioffe and Szegedy (2015)
GAIN = 4.0  # of Glorot and Bengio's initialisation (2010): the inverse of the sigmoid's slope at 0


def build(point: Point) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (PIXELS, WIDTH, WIDTH):
        # Batch norm subtracts the mean, which cancels a bias.
        layers.append(nn.Linear(inputs, WIDTH, bias=not point.batch_norm))
        layers += [normalisation(point)] if point.batch_norm else []
        layers.append(nn.Sigmoid())
    network = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    initialise(network, point.init, point.seed)
    return network


def normalisation(point: Point) -> bnext.BatchNorm1d:
    layer = bnext.BatchNorm1d(WIDTH)
    layer.virtual_batch_size = point.virtual_batch_size or None
    return layer


def initialise(network: nn.Sequential, init: str, seed: int) -> None:
    """The weights are the same with batch norm and without it."""
    weights, biases = (torch.Generator().manual_seed(2 * seed + which) for which in (0, 1))
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in layers:
        if init == "torch":  # torch's own distributions, drawn by our generators
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=weights)
        elif init == "normal":
            nn.init.normal_(layer.weight, generator=weights)
        else:
            nn.init.xavier_uniform_(layer.weight, gain=1 if layer is layers[-1] else GAIN, generator=weights)
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.in_features) if init == "torch" else 0.0
            nn.init.uniform_(layer.bias, -bound, bound, generator=biases)
