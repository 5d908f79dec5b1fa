"""`.ci/gpu` without a GPU: which steps run in which order, what follows a failure and a hang, what is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from marks import posix_only

SCRIPT = Path(__file__).parents[2] / ".ci" / "gpu"

pytestmark = posix_only

# A stub in the place of Python and of each tool. It appends its command line to NOTES and succeeds, unless its
# arguments contain FAILS. In the hang check it sleeps if HANGS is set.
STUB = """#!/bin/sh
echo "$0 $*" >>"$NOTES"
case "$*" in
  # Its worker does not heed SIGINT.
  *"-x tests/cuda/test_cuda_kernels.py -k every_way"*)
    [ -z "$HANGS" ] || { sleep 60 & echo "worker $!" >>"$NOTES"; exec sleep 60; } ;;
esac
case "$*" in *"$FAILS"*) exit 3 ;; esac
case "$0" in */nvcc) cp "$0" "$5" ;; esac  # its fifth argument is the program to make
"""


class Run:
    """A run of the script, with stubs for all that it calls."""

    def __init__(self, folder: Path, **variables: str) -> None:
        for name in ("python", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer"):
            stub = folder / name
            stub.write_text(STUB)
            stub.chmod(0o755)
        notes, self.results = folder / "notes", folder / "results"
        environment = {"FAILS": "no such text", "HANGS": "", **variables, "NOTES": str(notes)}
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [str(SCRIPT), str(self.results), str(folder / "python")],
            env={**os.environ, **environment, "PATH": path},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.status, self.errors = done.returncode, done.stderr
        self.steps = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("== ")][::2]
        self.commands = notes.read_text()


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended: its parent need not have taken notice."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


FIRST = ["import", "hang", "device", "tests", "benchmark"]
SECOND = ["probes", "ncu", "fused", "memcheck", "racecheck"]


def test_both_parts_run_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.status == 0, run.errors
    assert run.steps == FIRST + SECOND
    assert sorted(path.stem for path in run.results.glob("*.log")) == sorted(FIRST + SECOND)
    assert "--tool racecheck" in run.commands


@pytest.mark.parametrize(
    ("chosen", "steps"), [("first", FIRST), ("second", SECOND), ("tests fused", ["tests", "fused"])]
)
def test_steps_are_chosen(tmp_path: Path, chosen: str, steps: list[str]) -> None:
    assert Run(tmp_path, GPU_STEPS=chosen).steps == steps


def test_a_failed_step_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    run = Run(tmp_path, FAILS="test_cuda_device.py", GPU_STEPS="device tests")
    assert run.status == 1
    assert run.steps == ["device", "tests"]
    assert "failed: device (3)" in run.errors


def test_nothing_follows_a_hang(tmp_path: Path) -> None:
    run = Run(tmp_path, HANGS="1", GPU_HANG_S="1")
    assert run.status == 1
    assert run.steps == ["import", "hang"]
    assert "hang (124)" in run.errors
    (worker,) = re.findall(r"^worker (\d+)$", run.commands, re.MULTILINE)
    assert not is_running(int(worker))


def test_results_are_packed(tmp_path: Path) -> None:
    run = Run(tmp_path, GPU_PACK="1", GPU_STEPS="import benchmark")
    (packed,) = run.results.iterdir()
    assert packed.name == "gpu-import.tar.gz"
    with tarfile.open(packed) as archive:
        assert sorted(archive.getnames()) == ["./benchmark.log", "./import.log"]
