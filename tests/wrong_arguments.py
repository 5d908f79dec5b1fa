"""Wrong arguments of the operators, what each message must say, and how a call is held to it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import make_input, make_residual, name, same_bits
from torch import Tensor

Arguments = dict[str, object]
Call = Callable[[Arguments], object]

RAISES = (RuntimeError, ValueError, TypeError)

CHANNELS = 3

SHAPE = (4, CHANNELS, 5, 5)

WORDS = {  # of a dtype, in Python or in C++
    torch.float64: r"float64|double",
    torch.float32: r"float32|\bfloat\b",
    torch.float16: r"float16|half",
    torch.bfloat16: r"bfloat16",
    torch.int64: r"int64|\blong\b",
    torch.int32: r"int32|\bint\b",
    torch.bool: r"bool",
    torch.complex64: r"complex64|complexfloat",
}


class Wrong(NamedTuple):
    """An argument, its wrong value, and regular expressions that the message must contain besides the name."""

    id: str
    argument: str
    value: Callable[[], object]
    message: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.argument}-{self.id}"


def wrong_channel_vectors(argument: str, dtypes: tuple[torch.dtype, ...]) -> list[Wrong]:
    """Everything that may be wrong with one of weight, bias, running_mean and running_var."""
    rows = [
        Wrong("short", argument, lambda: torch.ones(2), (r"\b3\b", r"\b2\b")),
        Wrong("long", argument, lambda: torch.ones(4), (r"\b3\b", r"\b4\b")),
        Wrong("empty", argument, lambda: torch.ones(0), (r"\b3\b", r"\b0\b")),
        Wrong("0d", argument, lambda: torch.tensor(1.0), (r"\b1\b", r"\[\]|\b0\b")),
        Wrong("2d", argument, lambda: torch.ones(1, 3), (r"\b1\b", r"1, 3|\b2\b")),
        Wrong("4d", argument, lambda: torch.ones(1, 3, 1, 1), (r"\b1\b", r"1, 3, 1, 1|\b4\b")),
        Wrong("meta", argument, lambda: torch.ones(3, device="meta"), ("cpu", "meta")),
    ]
    rows += [
        Wrong(
            str(d).removeprefix("torch."),
            argument,
            lambda d=d: torch.ones(3, dtype=d),
            (WORDS[torch.float32], WORDS[d]),
        )
        for d in dtypes
    ]
    return rows


NOT_FLOAT32 = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)

WRONG_INPUTS = [
    Wrong("0d", "input", lambda: torch.tensor(1.0), (r"\b2\b", r"\[\]|\b0\b")),
    Wrong("1d", "input", lambda: torch.ones(3), (r"\b2\b", r"\[3\]|\b1\b")),
    *(
        Wrong(name, "input", lambda d=dtype: torch.ones(SHAPE, dtype=d), ("float32|floating", WORDS[dtype]))
        for name, dtype in (
            ("int64", torch.int64),
            ("int32", torch.int32),
            ("bool", torch.bool),
            ("complex64", torch.complex64),
        )
    ),
]

WRONG_VECTORS = [
    row for a in ("weight", "bias", "running_mean", "running_var") for row in wrong_channel_vectors(a, NOT_FLOAT32)
]

WRONG_COUNTERS = [
    Wrong("float32", "num_batches_tracked", lambda: torch.tensor(0.0), (WORDS[torch.int64], WORDS[torch.float32])),
    Wrong(
        "int32",
        "num_batches_tracked",
        lambda: torch.tensor(0, dtype=torch.int32),
        (WORDS[torch.int64], WORDS[torch.int32]),
    ),
    Wrong("two", "num_batches_tracked", lambda: torch.zeros(2, dtype=torch.int64), (r"\b1\b|one", r"\b2\b")),
    Wrong("none", "num_batches_tracked", lambda: torch.zeros(0, dtype=torch.int64), (r"\b1\b|one", r"\b0\b")),
    Wrong("meta", "num_batches_tracked", lambda: torch.tensor(0, device="meta"), ("cpu", "meta")),
]

OVERLAPPING = [
    Wrong("expanded", argument, lambda: torch.ones(1).expand(3), ("memory|overlap", r"\b0\b|expand"))
    for argument in ("running_mean", "running_var")
]

WRONG_RESIDUALS = [
    Wrong("batch", "residual", lambda: make_residual((3, *SHAPE[1:])), (r"4, 3, 5, 5", r"3, 3, 5, 5")),
    Wrong("channels", "residual", lambda: make_residual((4, 1, 5, 5)), (r"4, 3, 5, 5", r"4, 1, 5, 5")),
    Wrong("width", "residual", lambda: make_residual((4, 3, 5, 1)), (r"4, 3, 5, 5", r"4, 3, 5, 1")),
    Wrong("flat", "residual", lambda: make_residual((4, 3, 25)), (r"4, 3, 5, 5", r"4, 3, 25")),
    Wrong("rank", "residual", lambda: make_residual((1, *SHAPE)), (r"4, 3, 5, 5", r"1, 4, 3, 5, 5")),
    Wrong("vector", "residual", lambda: torch.ones(CHANNELS), (r"4, 3, 5, 5", r"\[3\]|\b1\b")),
    Wrong("scalar", "residual", lambda: torch.tensor(1.0), (r"4, 3, 5, 5|\b4\b", r"\[\]|\b0\b")),
    Wrong("empty", "residual", lambda: torch.ones(0, *SHAPE[1:]), (r"4, 3, 5, 5", r"0, 3, 5, 5")),
    *(
        Wrong(name(dtype), "residual", lambda d=dtype: torch.ones(SHAPE, dtype=d), (WORDS[torch.float32], WORDS[dtype]))
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    ),
    Wrong("meta", "residual", lambda: torch.ones(SHAPE, device="meta"), ("cpu", "meta")),
]


def arguments() -> Arguments:
    """Right ones."""
    return {
        "input": make_input(SHAPE),
        "weight": torch.ones(CHANNELS),
        "bias": torch.zeros(CHANNELS),
        "running_mean": torch.randn(CHANNELS),
        "running_var": torch.rand(CHANNELS) + 0.5,
        "num_batches_tracked": torch.tensor(5),
    }


def assert_raises_and_leaves_alone(call: Call, args: Arguments, *message: str) -> str:
    """Every tensor keeps its values and its version. `message` are regular expressions; returns what was said."""
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    before = {k: (v.detach().clone(), v._version) for k, v in tensors.items()}
    with pytest.raises(RAISES) as caught:
        call(args)
    for part in message:
        assert re.search(part, str(caught.value), re.IGNORECASE), f"{part!r} is not in {caught.value!s}"
    for key, (value, version) in before.items():
        assert same_bits(tensors[key], value), f"{key} was written to"
        assert tensors[key]._version == version, f"the version of {key} has changed"
    return str(caught.value)
