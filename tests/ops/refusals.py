"""Checks that a call refuses wrong arguments with an ordinary exception, which says what was expected and what came,
and that no tensor has changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from cases import same_bits
from torch import Tensor

Arguments = dict[str, object]

ORDINARY = (RuntimeError, ValueError, TypeError)

# Regular expressions for a dtype's names in messages of Python and C++.
WORDS = {
    torch.float64: r"float64|double",
    torch.float32: r"float32|\bfloat\b",
    torch.float16: r"float16|half",
    torch.bfloat16: r"bfloat16",
    torch.float8_e5m2: r"float8",
    torch.uint8: r"uint8|byte",
    torch.int64: r"int64|\blong\b",
    torch.int32: r"int32|\bint\b",
    torch.bool: r"bool",
    torch.complex64: r"complex64|complexfloat",
}


def told(value: object, good: object) -> tuple[str, ...]:
    """Regular expressions that a message must match: for what was expected, and for what came."""
    if not isinstance(good, Tensor) or value is None:
        return ()
    if not isinstance(value, Tensor):
        return ("Tensor", "" if isinstance(value, type) else type(value).__name__)
    if value.layout != torch.strided:
        return ()
    if value.device != good.device:
        return (str(good.device), str(value.device))
    if value.dtype != good.dtype:
        return (f"{WORDS[good.dtype]}|floating", WORDS[value.dtype])
    if value.shape == good.shape:
        return ()
    expected, came = (rf"\[{', '.join(map(str, t.shape))}\]|\b{t.ndim}D?\b|\b{t.numel()}\b" for t in (good, value))
    return rf"{expected}|at least 2|for each channel|processes, 7", came


def is_readable(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided


def remember(values: Mapping[str, object]) -> Callable[[], None]:
    """Returns a check that each readable tensor still has its present bits and version."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().resolve_neg().clone()

    tensors = {key: value for key, value in values.items() if is_readable(value)}
    before = {key: (bits(t), None if t.is_inference() else t._version) for key, t in tensors.items()}

    def check() -> None:
        for key, (value, version) in before.items():
            assert same_bits(bits(tensors[key]), value), f"{key} was written to"
            assert version is None or tensors[key]._version == version, f"the version of {key} has changed"

    return check


def raised(call: Callable[[Arguments], object], args: Arguments, *message: str) -> str:
    """The text of the exception that the call raises. Each regular expression must match it, and tensors must keep
    their bits and versions."""
    unchanged = remember(args)
    with pytest.raises(ORDINARY) as caught:
        call(args)
    for part in message:
        assert re.search(part, str(caught.value), re.IGNORECASE), f"{part!r} is not in {caught.value!s}"
    unchanged()
    return str(caught.value)
