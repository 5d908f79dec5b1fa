"""The activations that batch norm can apply on the way out, as users name them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from bnext import _C

NAMES = _C.activations
# Of those that have a slope just below zero to choose; elu's is its alpha.
SLOPES = {"leaky_relu": 0.01, "elu": 1.0}

Act = str | tuple[str, float] | None


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
    """act(value), of torch's functions."""
    if activation.name == "identity":
        return value
    slope = (activation.slope,) if activation.name in SLOPES else ()
    return getattr(torch.nn.functional, activation.name)(value, *slope)


_MODULES: dict[type[torch.nn.Module], str] = {
    torch.nn.Identity: "identity",
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.Hardtanh: "relu6",  # between 0 and 6
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.SiLU: "silu",
    torch.nn.GELU: "gelu",
    torch.nn.Hardswish: "hardswish",
    torch.nn.Mish: "mish",
    torch.nn.ELU: "elu",
}
# What torch's modules and timm's act_kwargs call the slope.
_SLOPE_NAMES = {"leaky_relu": "negative_slope", "elu": "alpha"}
# timm's names, where they differ.
_ALIASES = {"swish": "silu", "hard_swish": "hardswish"}


def of_module(module: torch.nn.Module) -> Act:
    """The activation that a module of torch computes.

    Raises:
        ValueError: it is of another class (a subclass may compute something else), an approximation, or cut elsewhere.
    """
    name = _MODULES.get(type(module))
    if name in SLOPES:
        return (name, float(getattr(module, _SLOPE_NAMES[name])))
    cut = (getattr(module, "min_val", 0), getattr(module, "max_val", 6))
    if name is None or getattr(module, "approximate", "none") != "none" or cut != (0, 6):
        raise ValueError(f"expected an activation that batch norm can apply ({_known_modules()}), but got {module!r}")
    return name


def of_layer(act_layer: Any, act_kwargs: dict[str, Any] | None = None) -> Act:
    """What timm's ``act_layer`` means: a module class, or a partial of one, a name, or None for the identity.

    Raises:
        ValueError: anything else.
    """
    if act_kwargs is not None and not isinstance(act_kwargs, dict):
        raise ValueError(f"expected act_kwargs to be a dict or None, but got {act_kwargs!r}")
    if act_layer is None:
        return None
    name = _ALIASES.get(act_layer, act_layer) if isinstance(act_layer, str) else None
    kind = act_layer.func if isinstance(act_layer, functools.partial) else act_layer
    if name in NAMES or (isinstance(kind, type) and kind in _MODULES):
        try:
            if name is None:
                act = of_module(act_layer(**(act_kwargs or {})))
            else:
                slope = (act_kwargs or {}).get(_SLOPE_NAMES.get(name, ""))
                act = name if slope is None else (name, slope)
            parse(act)
            return act
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected act_kwargs that {act_layer!r} can have, but got {act_kwargs!r}: {error}"
            ) from error
    raise ValueError(
        f"expected act_layer to be one of {_known_modules()}, one of {', '.join(NAMES)} or None, but got {act_layer!r}"
    )


def _known_modules() -> str:
    return ", ".join(f"torch.nn.{each.__name__}" for each in _MODULES)
