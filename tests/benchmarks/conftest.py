"""Fixtures of the benchmarks' tests."""

import gc
from collections.abc import Iterator

import pytest
from tiny_suites import run, tiny  # noqa: F401, fixtures


@pytest.fixture(autouse=True)
def _fast_collections() -> Iterator[None]:
    """Each measurement of memory begins with a garbage collection, which is slow if it visits all objects of torch."""
    gc.freeze()
    yield
    gc.unfreeze()
