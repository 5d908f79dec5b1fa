"""How tests run a job in several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Run = Callable[..., list[Any]]

EACH_WORLD = pytest.mark.parametrize("size", [2, 3], ids="world={}".format)
