"""`python -m bnext`: what was built and what runs here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

import bnext

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_prints_versions_instruction_set_and_threads(run_python: Run) -> None:
    done = run_python("-m", "bnext", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for fact in (bnext.__version__, torch.__version__, bnext._C.cpu_isas()[-1]):
        assert fact in done.stdout
    threads = next(line for line in done.stdout.splitlines() if "threads" in line)
    assert threads.split()[-1] == "1"


def test_import_is_quiet_and_starts_nothing(run_python: Run) -> None:
    # Importing warns of nothing, and loads no compiler; that it patches nothing is test_architecture.py's.
    code = (
        "import sys, torch, bnext\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'torch._inductor' not in sys.modules\n"
    )
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_version_is_that_of_the_installed_package() -> None:
    assert bnext.__version__.count(".") >= 2
    assert all(part.isdigit() for part in bnext.__version__.split(".")[:2])


def test_instruction_set_can_be_chosen(isa: str) -> None:
    assert bnext._C.cpu_isa() == isa
