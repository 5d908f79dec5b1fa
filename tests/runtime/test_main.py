"""`python -m bnext`: what was built and what runs here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

import bnext


def test_prints_versions_and_settings(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    slowest = bnext._C.cpu_isas()[0]
    variables = {"BNEXT_CPU_ISA": slowest, "BNEXT_CACHE_MB": "80", "BNEXT_HUGE_PAGES": "0"}
    done = run_python("-m", "bnext", OMP_NUM_THREADS="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    for fact in (bnext.__version__, torch.__version__, bnext._C.cpu_isas()[-1]):
        assert fact in done.stdout
    facts = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert facts["CPU instruction set"].split()[0] == slowest
    assert facts["threads"].split() == ["1"]
    assert "80 MB" in facts["freed outputs"]
    assert facts["huge pages"].split()[0] == "off"
