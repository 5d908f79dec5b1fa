"""Fixtures of this folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Turns Python's garbage collector off until the test ends."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
