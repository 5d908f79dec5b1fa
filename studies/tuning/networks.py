"""The networks, with bnext's batch norm between the linear map and the activation or without it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import bnext
from studies.tuning.digits import CLASSES
from studies.tuning.settings import Settings

PIXELS = 64
WIDTH = 100  # three layers of it, as in figure 1 of Ioffe and Szegedy (2015)
# Of Glorot and Bengio's initialisation (2010): 4 is the inverse of the sigmoid's slope at 0.
GAINS = {"sigmoid": 4.0, "relu": math.sqrt(2)}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}


@dataclass(frozen=True)
class Network:
    module: nn.Sequential
    watched: nn.Module  # the last hidden layer's activation; what goes into it is what batch norm should hold still


def build(settings: Settings, batch_norm: bool, seed: int) -> Network:
    activation = ACTIVATIONS[settings.activation]
    layers = {"mlp": _mlp, "cnn": _cnn}[settings.model](activation, batch_norm)
    module = nn.Sequential(*layers)
    initialise(module, settings.init, settings.activation, seed)
    return Network(module, [layer for layer in layers if isinstance(layer, activation)][-1])


def initialise(module: nn.Module, init: str, activation: str, seed: int) -> None:
    """The weights are the same with batch norm and without it."""
    weights, biases = (torch.Generator().manual_seed(2 * seed + which) for which in (0, 1))
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer in layers:
        if init == "torch":  # its own distributions; only the generators are ours
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=weights)
        else:
            gain = 1 if layer is layers[-1] else GAINS[activation]
            nn.init.xavier_uniform_(layer.weight, gain=gain, generator=weights)
        if layer.bias is not None:
            bound = 1 / math.sqrt(layer.weight[0].numel()) if init == "torch" else 0.0
            nn.init.uniform_(layer.bias, -bound, bound, generator=biases)


def _mlp(activation: type[nn.Module], batch_norm: bool) -> Sequence[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (PIXELS, WIDTH, WIDTH):
        # Batch norm takes the mean away, and a bias with it.
        layers.append(nn.Linear(inputs, WIDTH, bias=not batch_norm))
        layers += [bnext.BatchNorm1d(WIDTH)] if batch_norm else []
        layers.append(activation())
    return [*layers, nn.Linear(WIDTH, CLASSES)]


def _cnn(activation: type[nn.Module], batch_norm: bool) -> Sequence[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2)):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not batch_norm))
        layers += [bnext.BatchNorm2d(outputs)] if batch_norm else []
        layers.append(activation())
    return [*layers, nn.Flatten(), nn.Linear(16 * 4 * 4, CLASSES)]
