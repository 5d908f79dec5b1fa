"""What is there before a trace, to be compared and put back after it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Larger tensors are compared by their version, but not put back: a trace can reach them by tricks alone.
_KEPT_ELEMENTS = 2**16


def held(value: Any, seen: set[int] | None = None) -> Callable[[], bool]:
    """A function that makes ``value``, a container or a tensor, what it is now, and says whether it was not."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return lambda: False
    seen.add(id(value))
    if isinstance(value, dict):
        pairs = list(value.items())
        inner = [held(v, seen) for v in value.values()]

        def restore() -> bool:
            changed = len(value) != len(pairs) or any(
                k is not j or v is not w for (k, v), (j, w) in zip(value.items(), pairs, strict=True)
            )
            if changed:
                value.clear()
                value.update(pairs)
            return any([changed, *(f() for f in inner)])

        return restore
    if isinstance(value, (list, set)):
        items: Any = list(value) if isinstance(value, list) else set(value)
        inner = [held(v, seen) for v in value]

        def restore_items() -> bool:
            changed = len(value) != len(items) or (
                any(v is not w for v, w in zip(value, items, strict=True))
                if isinstance(value, list)
                else value != items
            )
            if changed:
                value.clear()
                value.extend(items) if isinstance(value, list) else value.update(items)
            return any([changed, *(f() for f in inner)])

        return restore_items
    if isinstance(value, Tensor) and not value.is_inference() and not isinstance(value, torch.nn.Parameter):
        version = value._version
        copy = value.detach().clone() if type(value) is Tensor and value.numel() <= _KEPT_ELEMENTS else None

        def restore_values() -> bool:
            changed = value._version != version
            if changed and copy is not None:
                with torch.no_grad():
                    value.copy_(copy)
            return changed

        return restore_values
    return lambda: False


def generators() -> list[Callable[[], bool]]:
    """For each global generator a function that sets it back, and says whether it had moved."""
    python, cpu = random.getstate(), torch.get_rng_state()

    def restore_python() -> bool:
        moved = random.getstate() != python
        random.setstate(python)
        return moved

    def restore_torch() -> bool:
        moved = not torch.equal(torch.get_rng_state(), cpu)
        torch.set_rng_state(cpu)
        return moved

    restores = [restore_python, restore_torch]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state = numpy.random.get_state()

        def restore_numpy() -> bool:
            now = numpy.random.get_state()
            moved = now[2:] != state[2:] or bool((now[1] != state[1]).any())
            numpy.random.set_state(state)
            return moved

        restores.append(restore_numpy)
    return restores
