"""A model in training in a process of its own: its steps, its memory, and its end."""

import os
import signal
import subprocess
import sys
import time
from concurrent import futures
from dataclasses import replace
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import torch
from waiting import until

from benchmarks import trainer_process as apart
from benchmarks.models import make_model
from benchmarks.suites import Case
from benchmarks.traffic import STEP
from benchmarks.training import STEPS, make_trainer

CASE = Case("training", (2, 3, 32, 32), "float32", "contiguous", (STEP,), model="resnet20")
MB = 1_000_000


def test_training_has_parameters_gradients_and_momentum_at_its_peak() -> None:
    case = replace(CASE, model="bottleneck", shape=(2, 4096, 2, 2))
    parameters = sum(4 * parameter.numel() for parameter in make_model(case, "cpu").parameters())
    with apart.trainer_process(case, "torch", "cpu", threads=1) as process:
        assert 3 * parameters < process.ask(apart.peak_here) < 6 * parameters


def test_it_trains_as_in_this_process_and_measures_its_steps() -> None:
    here = make_trainer(CASE, "bnext", make_model(CASE, "cpu"), "cpu")
    with apart.trainer_process(CASE, "bnext", "cpu", threads=1) as process:
        torch.testing.assert_close(process.results()["losses"], here.results()["losses"], rtol=1e-4, atol=0)
        assert len(process.losses) == STEPS + 1
        process.prepared(STEP)()
        begin = time.perf_counter()
        assert 0 < process.timeit(3) < time.perf_counter() - begin
        assert process.timeit(1) > 0
        assert process.page_faults >= 0
        shares = process.ask(apart.shares_here)
        assert min(shares["batch norm"], shares["batch norm backward"], shares["convolution"]) > 0
        assert shares["batch norm"] < shares["convolution"]


def test_page_faults_are_those_of_a_step() -> None:
    """Each step maps its large tensors afresh, and touches every page of them."""
    shape = (1, 3, 2048, 2048)
    with apart.trainer_process(replace(CASE, model="bn", shape=shape), "torch", "cpu", threads=1) as process:
        process.timeit(1)
    assert process.page_faults > 3 * 2048 * 2048 * 4 / 4096


def test_the_high_water_mark_counts_from_its_reset() -> None:
    torch.ones(200 * MB, dtype=torch.uint8)  # freed at once
    apart.reset_high_water()
    before = apart.status_bytes("VmRSS")
    assert abs(apart.status_bytes("VmHWM") - before) < 10 * MB
    torch.ones(100 * MB, dtype=torch.uint8)
    assert abs(apart.status_bytes("VmHWM") - before - 100 * MB) < 10 * MB


def test_an_error_in_the_process_is_raised_here() -> None:
    with (
        pytest.raises(KeyError, match="resnet51"),
        apart.trainer_process(replace(CASE, model="resnet51"), "torch", "cpu", 1),
    ):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, futures.TimeoutError])
def test_interrupt_and_timeout_end_the_process_and_no_other(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    another = get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    another.start()
    before = set(active_children())

    def interrupted(*_: object) -> None:
        assert len(set(active_children()) - before) == 1
        raise error

    monkeypatch.setattr(futures.Future, "result", interrupted)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else apart.ProcessError
    with pytest.raises(expected), apart.trainer_process(CASE, "torch", "cpu", threads=1):
        pass
    assert set(active_children()) == before >= {another}
    another.kill()
    another.join()


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    file, script = tmp_path / "pid", tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from benchmarks import trainer_process\n"
        "def wait(*_):\n"
        f"    open({str(file)!r}, 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n"
        "trainer_process.make_here = wait\n"
        "if __name__ == '__main__':\n"
        "    with trainer_process.trainer_process(None, '', 'cpu', 1): pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], env=environment)
    until(lambda: file.exists() and file.read_text() != "")
    child = Path(f"/proc/{file.read_text()}/stat")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until(lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z")
