"""What a fused model runs instead of what its author wrote: generated forwards, emptied activations, guarded sums.

A module is given a generated forward by a subclass of its own class, made for that and named like it. The subclass
is found again by what it was made from, so that copies and pickles of the module work, in another process too.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import linecache
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from bnext import activations, functional, modules
from bnext.activations import Act


class FusedActivation(torch.nn.Identity):
    """Keeps the place of an activation that the batch norm before it applies now."""

    def __init__(self, activation: torch.nn.Module) -> None:
        super().__init__()
        self.training = activation.training
        self.__dict__["_activation"] = activation  # no submodule: names, counts and state_dicts stay the same

    @property
    def activation(self) -> torch.nn.Module:
        """The module whose place this is."""
        activation: torch.nn.Module = self.__dict__["_activation"]
        return activation

    def extra_repr(self) -> str:
        return repr(self.activation)


def fits(input: Tensor, residual: object) -> bool:
    """Whether a sum of ``batch_norm(input)`` and ``residual`` has the input's shape and dtype without broadcasting
    or promotion. Tracing knows neither; with autocast, say, a residual may be of another dtype. While ``torch.fx``
    traces a fused model it is taken to fit: a layer that runs with one that does not raises."""
    if isinstance(input, fx.Proxy):
        return True
    return isinstance(residual, Tensor) and residual.shape == input.shape and residual.dtype == input.dtype


def add(normalized: Tensor, residual: Any, changed: str) -> Any:
    """The sum as it stood in the original; ``changed`` says which operand it was written to, if any."""
    if changed == "output":
        normalized += residual
        return normalized
    if changed == "residual":
        residual += normalized
        return residual
    return normalized + residual


def batch_norm_act(layer: torch.nn.Module, input: Tensor) -> Tensor:
    """act(batch_norm(input)) by a fused layer; one put in its place would lose the activation."""
    output: Tensor = _fused(layer)(input)
    return output


def batch_norm_add_act(layer: torch.nn.Module, input: Tensor, residual: Any, changed: str = "") -> Any:
    """act(batch_norm(input) + residual) by a fused layer, where the residual fits."""
    fused = _fused(layer)
    if fits(input, residual):
        return fused(input, residual)
    return activations.compose(add(fused.normalize(input), residual, changed), activations.parse(fused.act))


def _fused(layer: torch.nn.Module) -> modules.Activated:
    if isinstance(layer, modules.Activated) and layer.act is not None:
        return layer
    raise RuntimeError(
        f"expected a batch norm with an activation, as bnext.convert(fuse=True) left it, but got {layer}: call "
        "bnext.revert before replacing the layers of a model"
    )


def functional_add_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Any,
    training: bool,
    momentum: float,
    eps: float,
    act: Act,
    changed: str,
) -> Any:
    """act(batch_norm(input) + residual) by the functional call, where the residual fits."""
    if fits(input, residual):
        return functional.batch_norm_act(
            input, running_mean, running_var, weight, bias, residual, training, momentum, eps, act
        )
    normalized = functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activations.compose(add(normalized, residual, changed), activations.parse(act))


_made = itertools.count()


def is_generated(cls: type) -> bool:
    return "_bnext_original" in vars(cls)


def original(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class that a generated one was made from."""
    found: type[torch.nn.Module] = vars(cls)["_bnext_original"]
    return found


def with_forward(cls: type[torch.nn.Module], source: str, names: Mapping[str, object]) -> type[torch.nn.Module]:
    """A subclass of ``cls`` whose ``forward`` is that of the source, in which ``names`` are global."""
    # A class knows its subclasses without keeping them, so that a model's class can go with the last of its models.
    for found in cls.__subclasses__():
        own = vars(found)
        if own.get("_bnext_original") is cls and own["_bnext_source"] == source and own["_bnext_names"] == dict(names):
            return found
    return _make(cls, source, names)


def _make(cls: type[torch.nn.Module], source: str, names: Mapping[str, object]) -> type[torch.nn.Module]:
    digest = hashlib.sha256(f"{cls.__module__}.{cls.__qualname__}\n{source}".encode()).hexdigest()[:16]
    # torch.compile looks the globals of a function up by the name of its module, hence a module that can be imported.
    module = types.ModuleType(f"bnext._forward_{digest}_{next(_made)}")
    module.__dict__.update(names)
    sys.modules[module.__name__] = module
    filename = f"<{module.__name__} of {cls.__qualname__}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)
    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": _init,
        "__reduce_ex__": _reduce_ex,
        "_bnext_original": cls,
        "_bnext_source": source,
        "_bnext_names": dict(names),
        "forward": module.__dict__["forward"],
    }
    made = type(cls.__name__, (cls,), members)
    weakref.finalize(made, _forget, module.__name__, filename).atexit = False
    return made


def _forget(module: str, filename: str) -> None:
    sys.modules.pop(module, None)
    linecache.cache.pop(filename, None)


def _init(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """``type(module)(…)`` makes an original: the generated forward is for layers that were fused."""
    self.__class__ = original(type(self))
    type(self).__init__(self, *args, **kwargs)


def _reduce_ex(self: torch.nn.Module, protocol: Any) -> Any:
    """As the original's instances are pickled and copied, but for the class, which no import finds."""
    cls = type(self)
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    function, args, *rest = reduced
    own = vars(cls)
    names = {
        name: (value.__name__,) if isinstance(value, types.ModuleType) else value
        for name, value in own["_bnext_names"].items()
    }
    assert args[0] is cls
    return _new, (function, own["_bnext_original"], own["_bnext_source"], names, *args[1:]), *rest


def _new(
    function: Any, cls: type[torch.nn.Module], source: str, names: Mapping[str, object], *args: Any
) -> torch.nn.Module:
    values = {
        name: importlib.import_module(value[0]) if isinstance(value, tuple) else value for name, value in names.items()
    }
    made: torch.nn.Module = function(with_forward(cls, source, values), *args)
    return made
