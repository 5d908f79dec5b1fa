"""A file of tests that needs a package which is not installed is skipped, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("optuna", "needs optuna, which is not installed"),
        ("bnext.nonsense", "Interrupted: 1 error during collection"),  # no optional package
    ],
)
def test_only_a_missing_optional_package_skips_a_file(tmp_path: Path, missing: str, told: str) -> None:
    (tmp_path / "test_it.py").write_text(f'raise ModuleNotFoundError("No module named {missing!r}")\n')
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert told in done.stdout
