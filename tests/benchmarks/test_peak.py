"""The memory at its peak, measured in a process of its own, and what is left of that when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peak
from benchmarks.model_suites import STEP, ModelCase

CASE = ModelCase("training", "resnet50", (2, 3, 32, 32), "float32", "contiguous", (STEP,), ())
PARAMETERS = 4 * 25_557_032
MB = 1_000_000


def test_training_has_parameters_gradients_and_momentum_at_its_peak() -> None:
    found = peak.measure_peak(CASE, "torch", "cpu", threads=1)
    assert 3 * PARAMETERS < found < 6 * PARAMETERS


def test_the_mark_is_what_comes_after_it() -> None:
    torch.ones(200 * MB, dtype=torch.uint8)  # and is gone
    peak.reset_high_water()
    before = peak.status_bytes("VmRSS")
    assert abs(peak.status_bytes("VmHWM") - before) < 10 * MB
    torch.ones(100 * MB, dtype=torch.uint8)
    assert abs(peak.status_bytes("VmHWM") - before - 100 * MB) < 10 * MB


def test_what_fails_is_one_line() -> None:
    with pytest.raises(peak.PeakError, match=r"^KeyError: 'resnet51'$"):
        peak.measure_peak(replace(CASE, model="resnet51"), "torch", "cpu", threads=1)


def is_alive(pid: int) -> bool:
    """Not so of a process that has ended and is not waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_interrupt_ends_the_process_and_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    class Endless(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, _: object, **options: Any) -> None:
            super().__init__(["sh", "-c", "sleep 600 & echo $!; wait"], **options)

        def communicate(self, *args: Any, **options: Any) -> Any:
            if not pids:
                pids.extend((self.pid, int(self.stdout.readline())))
                raise KeyboardInterrupt
            return super().communicate(*args, **options)

    monkeypatch.setattr(peak.subprocess, "Popen", Endless)
    with pytest.raises(KeyboardInterrupt):
        peak.measure_peak(CASE, "torch", "cpu", threads=1)
    wait_for(lambda: not any(map(is_alive, pids)))


def test_it_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    """Also where that has no time to say so."""
    file = tmp_path / "pid"
    asked = (
        "import os, signal, subprocess, sys\n"
        "from benchmarks import peak\n"
        f"answer = lambda *_: (open({str(file)!r}, 'w').write(str(os.getpid())), signal.pause())\n"
        "if sys.argv[1:]: peak.peak_here = answer; peak.main(sys.argv[1])\n"
        "else: subprocess.run([sys.executable, __file__, REQUEST])\n"
    )
    request = '{"suite": "", "model": "", "shape": [], "dtype": "", "layout": "", "operations": [], "providers": [], '
    request += '"provider": "", "device": "cpu", "threads": 1}'
    script = tmp_path / "script.py"
    script.write_text(asked.replace("REQUEST", repr(request)))
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    wait_for(lambda: file.exists() and file.read_text() != "", seconds=60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_alive(int(file.read_text())))


def wait_for(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it is not so after all this time"
        time.sleep(0.02)
