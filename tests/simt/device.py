"""The emulated device, as the tests see it: bnext's operators, given CPU tensors, run the CUDA kernels in emulation.

Every load and store of a kernel is checked on the way (see emulator.h); a finding is raised as a RuntimeError with the
source lines. Outputs that a kernel does not write in full are findings too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from simt.build import build

OPERATORS = (
    "batch_norm_train",
    "batch_norm_eval",
    "batch_norm_recompute",
    "batch_norm_backward",
    "batch_norm_stats",
    "batch_norm_gathered",
)
GROUPS = ("block", "cluster", "grid")
TILES = ("channel", "columns")


class Limits(NamedTuple):
    """The kernels are planned as if the device had no more than this."""

    sms: int = 4
    shared_per_block: int = 227 * 1024
    max_cluster: int = 8
    max_grid: int = 2**31 - 1
    cooperative_sms: int = 2**31 - 1  # what a cooperative launch gets of them, whatever the plan counts on


@functools.cache
def library_or_error() -> Path | RuntimeError:
    """The library of this tree, unless BNEXT_SIMT_LIBRARY names another. A build that fails is not tried again."""
    if named := os.environ.get("BNEXT_SIMT_LIBRARY"):
        return Path(named)
    try:
        return build()
    except RuntimeError as error:
        return error


@functools.cache
def load() -> None:
    """Build what has changed, and load the library."""
    library = library_or_error()
    if isinstance(library, RuntimeError):
        raise library
    torch.ops.load_library(library)


def configure(limits: Limits, seed: int = 0, check: bool = True, count_requests: bool = False) -> None:
    load()
    torch.ops.bnext_simt.configure(*limits, seed, check, count_requests)


def last_plan() -> dict[str, int]:
    """The geometry of the last launch."""
    return dict(torch.ops.bnext_simt.last_plan())


@contextlib.contextmanager
def emulated(
    limits: Limits | None = None, seed: int = 0, check: bool = True, count_requests: bool = False
) -> Iterator[None]:
    """A context in which torch.ops.bnext.* run CPU tensors on the emulated device, below autograd."""
    configure(limits or Limits(), seed, check, count_requests)
    library = torch.library.Library("bnext", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name in OPERATORS:
            library.impl(name, getattr(torch.ops.bnext_simt, name).default, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
