"""What the tests of several processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import Pool
from sync_runs import Run


@pytest.fixture
def run(pools: Callable[[int], Pool]) -> Run:
    """Runs a job in as many processes as there are shares, or as `size` says."""

    def start(job: Callable[..., Any], *, size: int = 0, **arguments: Any) -> list[Any]:
        return pools(size or len(arguments["sizes"])).run(job, seed=torch.initial_seed(), **arguments)

    return start
