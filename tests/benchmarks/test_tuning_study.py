"""python -m benchmarks tuning as a user runs it: to the end, interrupted, killed, several at once."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from tuning_canned import MACHINE, SETTINGS, curve, trial
from waiting import PATIENCE_S, until

from studies.tuning import study as study_module
from studies.tuning.__main__ import main
from studies.tuning.results import Results, load_results
from studies.tuning.settings import Settings
from studies.tuning.study import add_machine, objective, opened, results_of, work

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("tuning_driver.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}

GRID = ("--alphas", "0.1,1", "--betas", "0.99", "--seeds", "0,1,2")
POINTS = Settings(alphas=(0.1, 1.0), betas=(0.99,), seeds=(0, 1, 2)).points

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A function that starts the command with imagined trials, in a process group of its own as a shell does."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(DRIVER), *arguments, *GRID, "--output", str(tmp_path)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        started.append(subprocess.Popen(command, env=ENVIRONMENT, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def group(pgid: int) -> set[int]:
    """The processes of a group that are alive."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(its_group) == pgid and state not in "ZX":
                found.add(int(entry.name))
    return found


def trials(folder: Path, state: str) -> list[tuple[int, str]]:
    """Number and time of completion of each trial in a state.

    Optuna would make the tables while the command makes them. The file is opened for writing, since SQLite has to undo
    what a killed process was writing.
    """
    query = "select number, datetime_complete from trials where state = ?"
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=rw", uri=True)) as database:
            return database.execute(query, (state,)).fetchall()
    except sqlite3.OperationalError:  # not made yet, or locked
        return []


def test_what_was_killed_goes_on_in_two_processes_that_share_it(start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "2", "--steps", "400")
    until(lambda: len(trials(tmp_path, "COMPLETE")) >= 2 and len(trials(tmp_path, "RUNNING")) == 2)
    killed = group(process.pid)
    assert len(killed) >= 3
    process.kill()
    until(lambda: not group(process.pid))
    before = trials(tmp_path, "COMPLETE")
    assert 2 <= len(before) < len(POINTS)

    for process in [start("--jobs", "1", "--steps", "400") for _ in range(2)]:
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
    found = load_results(tmp_path / "results.json").trials
    assert [trial.point for trial in found] == sorted(POINTS)
    assert len({trial.cpu_s for trial in found} - killed) == 2, "one of the two tried nothing"
    assert set(before) <= set(trials(tmp_path, "COMPLETE"))
    # Once all points have been started, both may try the two that were interrupted, and the other's last one.
    assert len(trials(tmp_path, "COMPLETE")) <= len(POINTS) + 3


def test_ctrl_c_leaves_no_process_and_no_failed_trial(start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "1", "--steps", "400")
    until(lambda: len(trials(tmp_path, "RUNNING")) == 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process that runs in it
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    # Before it there may be what Python prints of a KeyboardInterrupt that it drops, as a finalizer was running.
    assert errors.splitlines()[-1] == "python -m benchmarks tuning: interrupted"
    until(lambda: not group(process.pid))
    assert len(trials(tmp_path, "COMPLETE")) < len(POINTS), "it went on to the end"
    assert not trials(tmp_path, "FAIL"), "which would never be tried again"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_finalizer_is_no_less_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dropped:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    shown: list[str] = []
    worker: Future[None] = Future()

    def show_total(_: object, text: str, done: int) -> None:
        shown.append(text)
        if len(shown) == 1:
            Dropped()
        else:
            worker.set_result(None)  # the run would end by itself

    monkeypatch.setattr(study_module.ProgressBar, "show_total", show_total)
    monkeypatch.setattr(study_module, "processes", lambda *_: nullcontext([worker]))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--jobs", "1", *GRID, "--output", str(tmp_path)]) == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(shown) == 1
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--inits", "torch"), "a worker failed: NotImplementedError: torch"),
        (("--optimizer", "average"), "A process in the process pool was terminated abruptly"),
    ],
    ids=["raises", "dies"],
)
def test_an_error_in_a_worker_is_one_line_and_leaves_points_to_be_tried(
    option: tuple[str, str], said: str, start: Start, tmp_path: Path
) -> None:
    process = start("--jobs", "1", "--steps", "100", *option)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors.startswith(f"python -m benchmarks tuning: error: {said}")
    assert errors.endswith("; what was done is kept\n")
    assert errors.count("\n") == 1
    until(lambda: not group(process.pid))
    assert not trials(tmp_path, "COMPLETE")
    assert not trials(tmp_path, "FAIL"), "which would never be tried again"


def test_a_storage_that_fails_on_the_way_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise StorageInternalError("the server is gone\nand more")

    monkeypatch.setattr(study_module, "results", fail)
    assert main(["--jobs", "1", *GRID, "--output", str(tmp_path)]) == 2
    said = "python -m benchmarks tuning: error: the storage failed: the server is gone\n"
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_real_workers_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--alphas", "0.1,3e38", "--betas", "0.99", "--seeds", "0", "--steps", "12", "--virtual-batch-sizes", "4")
    storage = tmp_path / "elsewhere.db"
    assert main(["--jobs", "1", *grid, "--output", str(tmp_path), "--storage", f"sqlite:///{storage}"]) == 0
    results = load_results(tmp_path / "results.json")
    assert [machine["threads"] for machine in results.machines] == [1]
    assert len(results.trials) == 6
    found = {(t.point.alpha, t.point.batch_norm): t.diverged_at for t in results.trials}
    assert found[3e38, False] is not None
    assert found[0.1, False] is found[0.1, True] is None
    assert "with batch norm" in capsys.readouterr().out
    assert storage.exists()


def test_what_is_done_is_not_tried_again_and_of_a_point_tried_twice_one_result_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "run_trial", lambda _, point: trial(point, curve(point)))
    monkeypatch.setattr(study_module, "this_machine", lambda: MACHINE)
    settings = Settings(steps=SETTINGS.steps, alphas=(0.1, 1.0), betas=(0.99,), seeds=(0, 1))
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with opened(url, "s", settings) as study:
        add_machine(study, {**MACHINE, "date": "earlier"})
        # Two trials that a killed process left unfinished.
        for _ in range(2):
            study.ask()
        for _ in range(2):
            work(url, "s", settings)
        states = Counter(found.state for found in study.get_trials())
        assert states == {TrialState.COMPLETE: len(settings.points), TrialState.RUNNING: 2}
        assert {found.value for found in study.get_trials() if found.params.get("alpha") == 1.0} == {0, 0.97, 0.98}
        study.optimize(lambda made: objective(settings, made), n_trials=1)
        expected = [trial(point, curve(point)) for point in settings.points]
        assert results_of(study, settings) == Results.of(settings, [{**MACHINE, "date": "earlier"}], expected)
