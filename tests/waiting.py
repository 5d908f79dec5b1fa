"""Waiting for what another process does."""

import time
from collections.abc import Callable

PATIENCE_S = 60  # on a machine that does much else


def until(true: Callable[[], bool]) -> None:
    """Return as soon as the condition is true."""
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "it is not so after all this time"
        time.sleep(0.05)
