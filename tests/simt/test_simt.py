"""The emulator itself: what it must find, what it must not, and whether the kernels' tests would notice a fault."""

from __future__ import annotations

import subprocess

import pytest
from simt.build import BUILD, build
from simt.mutants import all_mutants, noticed_by

pytestmark = pytest.mark.simt


@pytest.mark.parametrize("seed", [0, 1])
def test_the_emulator_finds_what_is_wrong_and_nothing_else(seed: int) -> None:
    build()
    # It runs small kernels, each correct or with one fault planted, and prints "NAME ok" or "NAME FAILED: why".
    command = [str(BUILD / "selftest"), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    verdicts = done.stdout.splitlines()
    assert [line for line in verdicts if not line.endswith(" ok")] == []
    assert done.returncode == 0, done.stderr
    assert len(verdicts) > 100


@pytest.mark.slow
@pytest.mark.long
def test_a_missing_synchronisation_is_noticed() -> None:
    # `make mutants` tries all mutants. This one only a checker can notice: an addition that releases nothing.
    (mutant,) = [mutant for mutant in all_mutants() if "bnext_add_acq_rel(counter, share)" in mutant.before]
    build()
    assert noticed_by(mutant) is not None, mutant
