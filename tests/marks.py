"""Parametrisations that several files share, and conditions to skip a test. conftest.py declares the markers.

`each` takes every combination. `pairs` takes few of them, in which every two values of two parameters meet: enough
where a fault lies in one value, or in what two of them do to each other.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import ACTS, DTYPES, FEW_ACTS, Case, name, pairwise

import bnext

# Devices of the fixture `device` besides the CPU.
GPUS = [pytest.param("cuda", marks=pytest.mark.gpu)] if bnext._C.cuda and torch.cuda.is_available() else []
SIMT = pytest.param("simt", marks=pytest.mark.simt)

needs_gpu = pytest.mark.skipif(not GPUS, reason="there is no GPU, or bnext was built without CUDA")
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc, or needs memory that is kept on Linux only"
)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="sends a process SIGINT")
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")


# Python 3.12 warns of a fork while there are threads; those of torch and numpy are not used by the children.
FORK_WARNING = "ignore:This process:DeprecationWarning"


def _eps_may_be_zero_in_evaluation() -> bool:
    try:
        torch.nn.functional.batch_norm(torch.ones(2, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError:
        return False
    return True


# Since 2.13 torch takes eps=0 in evaluation, as bnext does.
needs_todays_rule_for_eps = pytest.mark.skipif(
    not _eps_may_be_zero_in_evaluation(), reason="this torch refuses eps=0 in evaluation, too"
)

WORDS = {
    "training": ("eval", "training"),
    "has_residual": ("alone", "residual"),
    "fuse": ("plain", "fused"),
    "grad": ("nograd", "grad"),
}


def label(parameter: str, value: object) -> str:
    """The id of a value: a word for a flag, `plain` for no activation."""
    if isinstance(value, bool):
        return WORDS[parameter][value] if parameter in WORDS else f"{parameter}={value}"
    if parameter == "act" and value is None:
        return "plain"
    if parameter == "dim":
        return f"{value}d"
    return value.__name__ if callable(value) else name(value)


def each(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises over one parameter, with `label` for its ids."""
    ((parameter, chosen),) = values.items()
    return pytest.mark.parametrize(parameter, chosen, ids=[label(parameter, value) for value in chosen])


def rows(parameters: Sequence[str], combinations: Sequence[Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrises over these combinations, with `label` for their ids."""
    ids = ["-".join(label(p, v) for p, v in zip(parameters, row, strict=True)) for row in combinations]
    return pytest.mark.parametrize(tuple(parameters), combinations, ids=ids)


def pairs(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises over combinations in which every two values of two parameters meet."""
    return rows(tuple(values), pairwise(*values.values()))


def in_emulation(chosen: Sequence[Case], cases: Sequence[Case]) -> list[Any]:
    """The cases; only the chosen ones run in emulation."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.not_emulated) for case in cases]


FLAGS = (True, False)
MODES = each(training=FLAGS)
RESIDUAL = each(has_residual=FLAGS)
EVERY_ACT = each(act=ACTS)
FEW = each(act=FEW_ACTS)
EACH_DTYPE = each(dtype=DTYPES)

# None (without a residual, the plain operator), and an activation of each kind.
PLAIN_OR_ACT = (None, *FEW_ACTS)

# More than 32 MiB. Training is compared in float64, since it compares most, and float64 has half as many values.
LARGER_THAN_THE_CACHE = rows(
    ("layout", "act", "training", "dtype"),
    [
        ("contiguous", None, True, torch.float64),
        ("channels_last", "relu", True, torch.float32),
        ("contiguous", "relu", False, torch.float32),
        ("channels_last", None, False, torch.float64),
    ],
)
