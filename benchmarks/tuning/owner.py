"""Whose a running trial is, and whether that process still lives."""

import os
import platform
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _host() -> str:
    """The same for two processes exactly if they can see each other by process id: containers cannot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{platform.node()}:{uuid.getnode():x}"


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot, which tells it from a later one of the same id. None: there is
    none, or it has ended and waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_dead(owner: Mapping[str, Any]) -> bool:
    """Known to be dead; False also where it cannot be known."""
    return owner["started"] is not None and owner["host"] == _host() and _started(int(owner["pid"])) != owner["started"]
