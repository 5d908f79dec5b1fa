"""The activations that can follow batch norm, by the names that users give them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext import _C

NAMES = _C.activations
# Defaults of the activations with a parameter: the slope just below zero, which is elu's alpha.
SLOPES = {"leaky_relu": 0.01, "elu": 1.0}

Act = str | tuple[str, float] | None

# What follows the normalisation: the residual, and the activation's name and slope; or nothing.
Epilogue = tuple[Tensor | None, str, float] | tuple[()]
PLAIN: Epilogue = ()


class Activation(NamedTuple):
    """``name`` is one of :data:`NAMES`; ``slope`` is leaky_relu's for negative values, elu's alpha, else 0."""

    name: str
    slope: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}({self.slope})" if self.name in SLOPES else self.name


IDENTITY = Activation("identity")


def parse(act: Act) -> Activation:
    """What ``act`` means: a name, ``("leaky_relu", slope)``, ``("elu", alpha)``, or None for the identity.

    Raises:
        ValueError: anything else; the message lists what is known.
    """
    if act is None:
        return IDENTITY
    if isinstance(act, str) and act in NAMES:
        return Activation(act, SLOPES.get(act, 0.0))
    if isinstance(act, tuple) and len(act) == 2 and isinstance(act[0], str) and act[0] in SLOPES:
        name, slope = act
        if isinstance(slope, (int, float)) and not isinstance(slope, bool) and math.isfinite(slope):
            return Activation(name, float(slope))
    raise ValueError(
        f'expected act to be one of {", ".join(NAMES)}, ("leaky_relu", slope), ("elu", alpha) or None, but got {act!r}'
    )


def compose(value: Any, activation: Activation) -> Any:
    """act(value), computed by torch's functions."""
    if activation.name == "identity":
        return value
    slope = (activation.slope,) if activation.name in SLOPES else ()
    return getattr(torch.nn.functional, activation.name)(value, *slope)
