"""The memory at its peak, measured in a process of its own, and what is left of that when it is interrupted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from test_tuning_study import until

from benchmarks import peak
from benchmarks.suites import Case
from benchmarks.traffic import STEP

CASE = Case("training", (2, 3, 32, 32), "float32", "contiguous", (STEP,), model="resnet50")
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


@pytest.fixture
def another() -> Iterator[BaseProcess]:
    """A child of this process that is no measurement's."""
    process = get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    process.start()
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("error", [KeyboardInterrupt, futures.TimeoutError])
def test_interrupt_and_timeout_end_the_process_and_no_other(
    error: type[BaseException], another: BaseProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(active_children())

    def interrupted(*_: object) -> None:
        assert len(set(active_children()) - before) == 1
        raise error

    monkeypatch.setattr(futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else peak.PeakError):
        peak.measure_peak(CASE, "torch", "cpu", threads=1)
    assert set(active_children()) == before
    assert another.is_alive()


def test_it_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    """Also where that has no time to say so."""
    file, script = tmp_path / "pid", tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from benchmarks import peak\n"
        "def wait(*_):\n"
        f"    open({str(file)!r}, 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
        "peak.peak_here = wait\n"
        "if __name__ == '__main__': peak.measure_peak(None, '', 'cpu', 1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    until(lambda: file.exists() and file.read_text() != "")
    child = Path(f"/proc/{file.read_text()}/stat")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")
