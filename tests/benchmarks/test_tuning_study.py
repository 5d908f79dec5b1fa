"""python -m benchmarks tuning as a user runs it: to the end, stopped, killed, several at once."""

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
from postgres import server
from sqlalchemy import create_engine, text
from tuning_canned import MACHINE, curve, trial
from waiting import PATIENCE_S, until

from studies.tuning import study as study_module
from studies.tuning.__main__ import main
from studies.tuning.results import Results, load_results
from studies.tuning.settings import Settings
from studies.tuning.study import add_machine, objective, opened, results_of, work

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("tuning_driver.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}

GRID = ("--alphas", "0.1,1", "--betas", "0.9,0.99", "--seeds", "0,1")
SHARED = Settings(alphas=(0.1, 1.0), betas=(0.9, 0.99), seeds=(0, 1))
POINTS = 24  # with 0.9005

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command with imagined trials, in a process group of its own as a shell does."""
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

    Not by Optuna, which would make the tables where they are being made. Not read only: what a killed process was
    writing has to be taken back first.
    """
    query = "select number, datetime_complete from trials where state = ?"
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=rw", uri=True)) as database:
            return database.execute(query, (state,)).fetchall()
    except sqlite3.OperationalError:  # not made yet, or locked
        return []


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'shared.db'}"
        return
    with server() as url:
        yield url


def test_two_processes_share_a_storage(storage: str, start: Start, tmp_path: Path) -> None:
    for process in [start("--jobs", "1", "--steps", "200", "--storage", storage) for _ in range(2)]:
        finish(process)
    found = load_results(tmp_path / "results.json").trials
    assert [trial.point for trial in found] == sorted(SHARED.points)
    assert len({trial.cpu_s for trial in found}) == 2, "one of them tried nothing"
    states = states_in(storage)
    assert list(states) == ["COMPLETE"], "a trial was lost"
    assert POINTS <= states["COMPLETE"] <= POINTS + 2, "each repeats one of the last at most"


def states_in(url: str) -> Counter[str]:
    """How many trials of a storage are in each state."""
    engine = create_engine(url)
    with closing(engine.connect()) as database:
        states = database.execute(text("select state from trials")).scalars().all()
    engine.dispose()
    return Counter(states)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_was_ended_leaves_no_process_and_goes_on(number: signal.Signals, start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "2", "--steps", "300")
    until(lambda: len(trials(tmp_path, "COMPLETE")) >= 3 and len(trials(tmp_path, "RUNNING")) == 2)
    assert len(group(process.pid)) >= 3
    # A terminal sends Ctrl-C to every process that runs in it.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        said = "interrupted; what is done is kept, and the same command goes on"
        assert errors == f"python -m benchmarks tuning: {said}\n"
    until(lambda: not group(process.pid))
    before = trials(tmp_path, "COMPLETE")
    assert 3 <= len(before) < POINTS

    finish(start("--jobs", "2", "--steps", "300"))
    assert len(load_results(tmp_path / "results.json").trials) == POINTS
    assert set(before) <= set(trials(tmp_path, "COMPLETE"))
    assert len(trials(tmp_path, "COMPLETE")) <= POINTS + 2, "each worker repeats one of the last at most"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--inits", "torch"), "a worker failed: NotImplementedError: torch"),
        (("--optimizer", "average"), "a worker died"),
    ],
    ids=["raises", "dies"],
)
def test_an_error_in_a_worker_is_one_line_and_leaves_points_to_be_tried(
    option: tuple[str, str], said: str, start: Start, tmp_path: Path
) -> None:
    process = start("--jobs", "2", "--steps", "100", *option)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == f"python -m benchmarks tuning: error: {said}; what was done is kept\n"
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


@pytest.mark.slow
def test_real_workers_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("--alphas", "0.1,3e38", "--betas", "0.99", "--seeds", "0,1", "--steps", "12")
    assert main(["--jobs", "1", *grid, "--output", str(tmp_path)]) == 0
    results = load_results(tmp_path / "results.json")
    assert len(results.trials) == 8
    assert [machine["threads"] for machine in results.machines] == [1]
    found = {(t.point.alpha, t.point.batch_norm): t.diverged_at for t in results.trials}
    assert found[3e38, False] is not None
    assert found[0.1, False] is found[0.1, True] is None
    assert "with batch norm" in capsys.readouterr().out


# The storage.

SETTINGS = Settings(steps=4, alphas=(0.1, 1.0), betas=(0.99,), seeds=(0, 1))


def test_what_is_done_is_not_tried_again_and_of_a_point_tried_twice_one_result_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "run_trial", lambda _, point: trial(point, curve(point)))
    monkeypatch.setattr(study_module, "this_machine", lambda: MACHINE)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with opened(url, "s", SETTINGS) as study:
        add_machine(study, {**MACHINE, "date": "earlier"})
        # Two processes were killed, one of them twice at the same point.
        for _ in range(2):
            study.ask()
        for _ in range(2):
            work(url, "s", SETTINGS)
        states = Counter(found.state for found in study.get_trials())
        assert states == {TrialState.COMPLETE: len(SETTINGS.points), TrialState.RUNNING: 2}
        assert {found.value for found in study.get_trials() if found.params.get("alpha") == 1.0} == {0, 0.97, 0.98}
        study.optimize(lambda made: objective(SETTINGS, made), n_trials=1)
        expected = [trial(point, curve(point)) for point in SETTINGS.points]
        assert results_of(study, SETTINGS) == Results.of(SETTINGS, [{**MACHINE, "date": "earlier"}], expected)
