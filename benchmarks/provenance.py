"""Where, with what and when: the machine, the versions and the commit of a run."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import bnext
from benchmarks.rows import TOUCHED, Provenance
from bnext import _C

# These variables decide whether a large output lies on fresh 4 KB pages, huge pages or memory already touched.
ENVIRONMENT = ("THP_MEM_ALLOC_ENABLE", *TOUCHED, "BNEXT_HUGE_PAGES", "BNEXT_CACHE_MB")


def cpu_name() -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, ``-dirty`` where tracked files are changed; ``unknown`` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def provenance(threads: int) -> Provenance:
    return Provenance(
        device="cpu",
        device_name=cpu_name(),
        isa=_C.cpu_isa(),
        threads=threads,
        torch_version=torch.__version__,
        bnext_version=bnext.__version__,
        python_version=platform.python_version(),
        commit=commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
