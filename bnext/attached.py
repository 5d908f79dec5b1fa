"""Objects in a module's ``__dict__`` that act for that module: they keep its class, and go where it goes.

A module that is copied, pickled or replicated must not be left with an object that acts for the original. So each knows
its owner by a weak reference, puts a successor into a copy, and is pickled as a call that attaches another one.
"""

from __future__ import annotations

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


class Forward(Attached):
    """Takes the place of the forward of the owner's class: a function of the owner and its arguments."""

    def __init__(self, owner: torch.nn.Module, function: Callable[..., Any]) -> None:
        super().__init__(owner)
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self._owner(), *args, **kwargs)

    def follow(self, copy: torch.nn.Module) -> Attached:
        return attach_forward(copy, self._function)

    def remake(self) -> tuple[Any, ...]:
        return attach_forward, (self._owner(), self._function)


class _Replicate(Attached):
    """Takes the place of ``_replicate_for_data_parallel``, which copies ``__dict__`` as it is."""

    def __call__(self) -> torch.nn.Module:
        owner = self._owner()
        assert owner is not None
        replica: torch.nn.Module = type(owner)._replicate_for_data_parallel(owner)
        for key, value in list(replica.__dict__.items()):
            if isinstance(value, Attached):
                del replica.__dict__[key]
                if isinstance(value, Forward):
                    value.follow(replica)
        return replica

    def follow(self, copy: torch.nn.Module) -> Attached:
        return attach(copy, _Replicate(copy), _REPLICATE)

    def remake(self) -> tuple[Any, ...]:
        return _attach_replicate, (self._owner(),)


_REPLICATE = "_replicate_for_data_parallel"


def attach(owner: torch.nn.Module, attached: Attached, *keys: str) -> Attached:
    """Put an object into its owner's ``__dict__``, where replicas of the owner do not take it for theirs."""
    for key in keys:
        owner.__dict__[key] = attached
    if _REPLICATE not in keys:
        _attach_replicate(owner)
    return attached


def attach_forward(owner: torch.nn.Module, function: Callable[..., Any]) -> Attached:
    """Let a module compute a function of itself and its arguments in place of its class's forward."""
    return attach(owner, Forward(owner, function), "forward")


def detach(owner: torch.nn.Module) -> None:
    """Take everything attached out of a module."""
    for key, value in list(owner.__dict__.items()):
        if isinstance(value, Attached):
            del owner.__dict__[key]


def _attach_replicate(owner: torch.nn.Module) -> Attached:
    return attach(owner, _Replicate(owner), _REPLICATE)
