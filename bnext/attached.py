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
    """Put an object into its owner's ``__dict__``, where replicas of the owner do not take it for theirs."""
    for key in keys:
        owner.__dict__[key] = attached
    replicating = _behind(owner.__dict__.get(_REPLICATE))
    if _REPLICATE not in keys and not (replicating and replicating.acts_for(owner)):
        attach_method(owner, _REPLICATE, _replicate)
    return attached


def attach_method(owner: torch.nn.Module, name: str, function: Callable[..., Any], lasting: bool = False) -> Attached:
    """Let a function of a module and of a method's arguments take the method's place. A lasting one is no part of a
    conversion, and stays when that is undone. It is for users to call, on a temporary, too, of which nothing is left
    but the method when it is called: it keeps its owner alive. Of the others, modules call their own."""
    method = Method(owner, name, function, lasting)
    method.holds = owner if lasting else None
    attach(owner, method, name)
    owner.__dict__[name] = method.call
    return method


def attached_function(owner: torch.nn.Module, name: str) -> Callable[..., Any] | None:
    """What takes the place of a method, if anything does."""
    attached = _behind(owner.__dict__.get(name))
    return attached.function if isinstance(attached, Method) else None


def detach_methods(owner: torch.nn.Module, *names: str) -> None:
    """Undo :func:`attach_method`."""
    for name in names:
        del owner.__dict__[name]
    if _attached_to(owner).keys() == {_REPLICATE}:
        del owner.__dict__[_REPLICATE]


def _without_owner(name: str, function: Callable[..., Any], lasting: bool = False) -> Method:
    return Method(torch.nn.Module(), name, function, lasting)  # which is gone when this returns


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
    """Take everything attached out of a module, but methods that are lasting."""
    temporary = [key for key, a in _attached_to(owner).items() if not (isinstance(a, Method) and a.lasting)]
    detach_methods(owner, *(key for key in temporary if key != _REPLICATE))


def _attached_to(owner: torch.nn.Module) -> dict[str, Attached]:
    found = {key: _behind(value) for key, value in owner.__dict__.items()}
    return {key: attached for key, attached in found.items() if attached is not None}


def _behind(value: Any) -> Attached | None:
    """What a value in ``__dict__`` was attached by."""
    attached = value.__self__ if isinstance(value, types.MethodType) else value
    return attached if isinstance(attached, Attached) else None


def without_attached(owner: torch.nn.Module) -> torch.nn.Module:
    """A module of the owner's class, with its parameters and all else that the owner has, but nothing attached."""
    plain = type(owner).__new__(type(owner))
    attached = _attached_to(owner)
    plain.__dict__.update({key: value for key, value in owner.__dict__.items() if key not in attached})
    return plain


_FORWARD = "forward"
_PREPARE = "__prepare_scriptable__"  # by which torch.jit.script asks for what to script
_REPLICATE = "_replicate_for_data_parallel"  # which copies __dict__ as it is


def _replicate(owner: torch.nn.Module) -> torch.nn.Module:
    replica: torch.nn.Module = type(owner)._replicate_for_data_parallel(owner)
    for key, attached in _attached_to(replica).items():
        del replica.__dict__[key]
        if isinstance(attached, Method) and key != _REPLICATE:
            attached.follow(replica)
    return replica
