"""Waiting for what another process does."""

import time
from collections.abc import Callable

PATIENCE_S = 60  # long, for a machine that is busy


def until(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition is true."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {PATIENCE_S} s"
        time.sleep(0.05)
