"""Objects in a module's ``__dict__`` that act for that module: they keep its class, and go where it goes.

A module that is copied, pickled or replicated must not be left with an object that acts for the original. So each knows
its owner by a weak reference, puts a successor into a copy, and is pickled as a call that attaches another one.
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
        """Attach what acts for a copy of the owner."""

    @abstractmethod
    def remake(self) -> tuple[Any, ...]:
        """A function and its arguments, which an unpickled owner calls before it has its state: it attaches an equal
        object."""

    def __reduce__(self) -> tuple[Any, ...]:
        kind = type(self._owner())
        if kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__:
            return self.remake()
        return type(None), ()  # a class with a pickling of its own, as torch.fx's, cannot be the argument of a call

    def acts_for(self, module: torch.nn.Module) -> bool:
        """Whether the module is its owner, and not a shallow copy, which shares the owner's ``__dict__`` entries."""
        return self._owner() is module

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached | None:
        # deepcopy notes the owner's copy before it copies the owner's state. A copy it has not noted goes without.
        copy = memo.get(id(self._owner()))
        return None if copy is None else self.follow(copy)


class Method(Attached):
    """Takes the place of a method of the owner's class: a function of the owner and the method's arguments.

    In ``__dict__`` is the bound method :meth:`call`. By its code ``torch._dynamo`` tells a forward in ``__dict__`` from
    others, so that copies of a model share its graphs.
    """

    def __init__(self, owner: torch.nn.Module, name: str, function: Callable[..., Any]) -> None:
        super().__init__(owner)
        self._name = name
        self._function = function

    def call(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner()
        if owner is None:
            raise RuntimeError(
                f"expected the layer whose {self._name} was converted, but it is gone: bnext.convert is to be called "
                "again on a copy that shared its __dict__, or was not made by copy.deepcopy"
            )
        return self._function(owner, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return super().__deepcopy__(memo) or _without_owner(self._name, self._function)

    def __reduce__(self) -> tuple[Any, ...]:
        reduced = super().__reduce__()
        return reduced if reduced[1] else (_without_owner, (self._name, self._function))

    def follow(self, copy: torch.nn.Module) -> Attached:
        return attach_method(copy, self._name, self._function)

    def remake(self) -> tuple[Any, ...]:
        return attach_method, (self._owner(), self._name, self._function)


def attach(owner: torch.nn.Module, attached: Attached, *keys: str) -> Attached:
    """Put an object into its owner's ``__dict__``, where replicas of the owner do not take it for theirs."""
    for key in keys:
        owner.__dict__[key] = attached
    if _REPLICATE not in keys:
        attach_method(owner, _REPLICATE, _replicate)
    return attached


def attach_method(owner: torch.nn.Module, name: str, function: Callable[..., Any]) -> Attached:
    method = Method(owner, name, function)
    attach(owner, method, name)
    owner.__dict__[name] = method.call
    return method


def _without_owner(name: str, function: Callable[..., Any]) -> Method:
    return Method(torch.nn.Module(), name, function)  # which is gone when this returns


def attach_forward(owner: torch.nn.Module, function: Callable[..., Any]) -> None:
    """Let a module compute a function of itself and its arguments in place of its class's forward. ``torch.jit.script``
    takes the class's."""
    attach_method(owner, _FORWARD, function)
    attach_method(owner, _PREPARE, without_attached)


def has_forward(owner: torch.nn.Module) -> bool:
    """Whether :func:`attach_forward` was there."""
    return isinstance(_behind(owner.__dict__.get(_FORWARD)), Method)


def detach_forward(owner: torch.nn.Module) -> None:
    """Undo :func:`attach_forward`."""
    if has_forward(owner):
        del owner.__dict__[_FORWARD], owner.__dict__[_PREPARE]


def detach(owner: torch.nn.Module) -> None:
    """Take everything attached out of a module."""
    for key, value in list(owner.__dict__.items()):
        if _behind(value) is not None:
            del owner.__dict__[key]


def _behind(value: Any) -> Attached | None:
    """What a value in ``__dict__`` was attached by."""
    attached = value.__self__ if isinstance(value, types.MethodType) else value
    return attached if isinstance(attached, Attached) else None


def without_attached(owner: torch.nn.Module) -> torch.nn.Module:
    """A module of the owner's class, with its parameters and all else that the owner has, but nothing attached."""
    plain = type(owner).__new__(type(owner))
    plain.__dict__.update(owner.__dict__)
    detach(plain)
    return plain


_FORWARD = "forward"
_PREPARE = "__prepare_scriptable__"  # by which torch.jit.script asks for what to script
_REPLICATE = "_replicate_for_data_parallel"  # which copies __dict__ as it is


def _replicate(owner: torch.nn.Module) -> torch.nn.Module:
    replica: torch.nn.Module = type(owner)._replicate_for_data_parallel(owner)
    for key, value in list(replica.__dict__.items()):
        attached = _behind(value)
        if attached is not None:
            del replica.__dict__[key]
            if isinstance(attached, Method) and key != _REPLICATE:
                attached.follow(replica)
    return replica
