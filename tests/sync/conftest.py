"""Tests that several processes run at once: those that take `world`."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from processes import Pool


@pytest.fixture
def world(request: pytest.FixtureRequest, pools: Callable[[int], Pool]) -> Pool:
    """A process for each share in `sizes`, or as many as the test is parametrised with, or two."""
    shares = len(request.getfixturevalue("sizes")) if "sizes" in request.fixturenames else 2
    return pools(getattr(request, "param", shares))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the test in each process of the pool instead of here; there `world` says which process it is."""
    parameters = inspect.signature(pyfuncitem.function).parameters
    if "world" not in parameters:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in parameters}
    pool = arguments.pop("world")
    pool.run(pyfuncitem.function, seed=torch.initial_seed(), timeout=120, **arguments)
    return True
