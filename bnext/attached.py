"""Objects in a module's ``__dict__`` that act for it: its class stays, and its copies get objects of their own.

A copy, pickle or replica of a module must not be left with an object that acts for the original. So each object holds a
weak reference to its owner, attaches a successor to a copy, and is pickled as a call that attaches an equal object.
"""

from __future__ import annotations

import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch


class Attached(ABC):
    """Acts for one module, which owns it."""

    def __init__(self, owner: torch.nn.Module) -> None:
        self._owner = weakref.ref(owner)

    @abstractmethod
    def follow(self, copy: torch.nn.Module) -> Attached:
        """Attach a successor, which acts for a copy of the owner."""

    @abstractmethod
    def remake(self) -> tuple[Any, ...]:
        """A function and its arguments, to be called when the owner is unpickled, before it has its state: the call
        attaches an equal object."""

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self._owner())
        if kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__:
            return self.remake()
        return type(None), ()  # an owner with a pickling of its own, as torch.fx's, cannot be an argument of the call

    def acts_for(self, module: torch.nn.Module) -> bool:
        """Whether the module is its owner, and not a shallow copy, which shares the owner's ``__dict__`` entries."""
        return self._owner() is module

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached | None:
        # deepcopy puts the owner's copy into memo before it copies the owner's state; other copies get no successor.
        copy = memo.get(id(self._owner()))
        return None if copy is None else self.follow(copy)


class Method(Attached):
    """Takes the place of a method of the owner's class: a function of the owner and the method's arguments.

    In ``__dict__`` is the bound method :meth:`call`. ``torch._dynamo`` identifies a forward in ``__dict__`` by its code
    object, so copies of a model share its graphs.
    """

    def __init__(self, owner: torch.nn.Module, name: str, function: Callable[..., Any], lasting: bool = False) -> None:
        super().__init__(owner)
        self._name = name
        self.function = function
        self.lasting = lasting
        self.holds: torch.nn.Module | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        if owner is None:
            raise RuntimeError(
                f"expected the layer whose {self._name} was replaced, but it is gone: bnext.convert, or bnext.freeze, "
                "is to be called again on a copy that shared its __dict__, or was not made by copy.deepcopy"
            )
        return self.function(owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return super().__deepcopy__(memo) or _without_owner(self._name, self.function, self.lasting)

    def __reduce__(self) -> tuple[Any, ...]:
        reduced = super().__reduce__()
        return reduced if reduced[1] else (_without_owner, (self._name, self.function, self.lasting))

    def follow(self, copy: torch.nn.Module) -> Attached:
        return attach_method(copy, self._name, self.function, self.lasting)

    def remake(self) -> tuple[Any, ...]:
        return attach_method, (self._owner(), self._name, self.function, self.lasting)


def attach(owner: torch.nn.Module, attached: Attached, *keys: str) -> Attached:
    """Put an object into its owner's ``__dict__``, and see to it that replicas of the owner do not use it."""
    for key in keys:
        owner.__dict__[key] = attached
    replicating = _behind(owner.__dict__.get(_REPLICATE))
    if _REPLICATE not in keys and not (replicating and replicating.acts_for(owner)):
        attach_method(owner, _REPLICATE, _replicate)
    return attached


def attach_method(owner: torch.nn.Module, name: str, function: Callable[..., Any], lasting: bool = False) -> Attached:
    """Replace a method by a function of the module and the method's arguments. A lasting one is not part of a
    conversion, and stays when the conversion is undone. Users may call it on a temporary, of which only the bound
    method is left during the call, so the method keeps its owner alive. The others are called by their owners."""
    method = Method(owner, name, function, lasting)
    method.holds = owner if lasting else None
    attach(owner, method, name)
    owner.__dict__[name] = method.call
    return method


def attached_function(owner: torch.nn.Module, name: str) -> Callable[..., Any] | None:
    """The function that replaces a method, if one does."""
    attached = _behind(owner.__dict__.get(name))
    return attached.function if isinstance(attached, Method) else None


def detach_methods(owner: torch.nn.Module, *names: str) -> None:
    """Undo :func:`attach_method`."""
    for name in names:
        del owner.__dict__[name]
    if _attached_to(owner).keys() == {_REPLICATE}:
        del owner.__dict__[_REPLICATE]


def _without_owner(name: str, function: Callable[..., Any], lasting: bool = False) -> Method:
    return Method(torch.nn.Module(), name, function, lasting)  # the module is gone when this returns


def attach_forward(owner: torch.nn.Module, function: Callable[..., Any]) -> None:
    """Replace a module's forward by a function of the module and its arguments. ``torch.jit.script`` still takes the
    class's forward."""
    attach_method(owner, _FORWARD, function)
    attach_method(owner, _PREPARE, without_attached)


def has_forward(owner: torch.nn.Module) -> bool:
    """Whether :func:`attach_forward` has replaced the module's forward."""
    return isinstance(_behind(owner.__dict__.get(_FORWARD)), Method)


def detach_forward(owner: torch.nn.Module) -> None:
    """Undo :func:`attach_forward`."""
    if has_forward(owner):
        del owner.__dict__[_FORWARD], owner.__dict__[_PREPARE]


def detach(owner: torch.nn.Module) -> None:
    """Remove everything that is attached to a module, except lasting methods."""
    temporary = [key for key, a in _attached_to(owner).items() if not (isinstance(a, Method) and a.lasting)]
    detach_methods(owner, *(key for key in temporary if key != _REPLICATE))


def _attached_to(owner: torch.nn.Module) -> dict[str, Attached]:
    found = {key: _behind(value) for key, value in owner.__dict__.items()}
    return {key: attached for key, attached in found.items() if attached is not None}


def _behind(value: Any) -> Attached | None:
    """The attached object that a value in ``__dict__`` is, or is a method of, if any."""
    attached = value.__self__ if isinstance(value, types.MethodType) else value
    return attached if isinstance(attached, Attached) else None


def without_attached(owner: torch.nn.Module) -> torch.nn.Module:
    """A module of the owner's class, with its parameters and all else that the owner has, but nothing attached."""
    plain = type(owner).__new__(type(owner))
    attached = _attached_to(owner)
    plain.__dict__.update({key: value for key, value in owner.__dict__.items() if key not in attached})
    return plain


_FORWARD = "forward"
_PREPARE = "__prepare_scriptable__"  # torch.jit.script scripts what this method returns
_REPLICATE = "_replicate_for_data_parallel"  # torch's copies __dict__ as it is


def _replicate(owner: torch.nn.Module) -> torch.nn.Module:
    replica: torch.nn.Module = type(owner)._replicate_for_data_parallel(owner)
    for key, attached in _attached_to(replica).items():
        del replica.__dict__[key]
        if isinstance(attached, Method) and key != _REPLICATE:
            attached.follow(replica)
    return replica
