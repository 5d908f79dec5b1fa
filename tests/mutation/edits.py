"""Planting faults. The text that a fault replaces must occur exactly once, so that no fault outlives its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Fault(NamedTuple):
    """`after` in the place of `before` in a file. In C++ both are expressions of one type."""

    name: str
    file: str
    before: str
    after: str
    test: str  # the test that should fail, by its path in tests/

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.name}  {self.file}: {before}  ->  {after}"


def planted(source: str, faults: Iterable[Fault], replacement: Callable[[Fault], str]) -> str:
    """The source, with the `replacement` of each fault in the place of its text.

    Raises:
        RuntimeError: the text of a fault is not there, is there more than once, or is part of another's.
    """
    end = len(source)
    for begin, fault in sorted(((_position(source, fault), fault) for fault in faults), reverse=True):
        if begin + len(fault.before) > end:
            raise RuntimeError(f"{fault.name}: what it replaces in {fault.file} is part of what another fault replaces")
        source = source[:begin] + replacement(fault) + source[begin + len(fault.before) :]
        end = begin
    return source


def _position(source: str, fault: Fault) -> int:
    found = source.count(fault.before)
    if found != 1:
        raise RuntimeError(f"{fault.name}: {fault.before!r} is {found} times in {fault.file}, not once")
    return source.index(fault.before)
