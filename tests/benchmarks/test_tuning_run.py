"""python -m benchmarks tuning as a user runs it: to the end, stopped, killed, several at once."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from optuna.exceptions import StorageInternalError

from benchmarks.tuning import workers
from benchmarks.tuning.__main__ import main
from benchmarks.tuning.results import load_results
from benchmarks.tuning.storage import SharedStudy, load_study

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("tuning_driver.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
PATIENCE_S = 120  # of a machine that does much else

GRID = ("--alphas", "0.1,1", "--betas", "0.9,0.99", "--seeds", "0,1")
POINTS = 24  # with 0.9005

Start = Callable[..., "subprocess.Popen[str]"]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command with imagined trials, in a process group of its own as a shell does."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(DRIVER), *arguments, *GRID, "--output", str(tmp_path), "--study", "s"]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
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


class Kept(NamedTuple):
    """A trial as the storage has it."""

    number: int
    state: str
    completed: str | None
    grid_id: int | None
    owner: int | None  # its process


# Read only, and not by Optuna, which would make the tables where they are being made.
QUERY = """
    select number, state, datetime_complete, s.value_json, json_extract(u.value_json, '$.pid') from trials t
    left join trial_system_attributes s on s.trial_id = t.trial_id and s.key = 'grid_id'
    left join trial_user_attributes u on u.trial_id = t.trial_id and u.key = 'owner'
"""


def trials(folder: Path) -> list[Kept]:
    try:
        with closing(sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True)) as database:
            found = database.execute(QUERY).fetchall()
    except sqlite3.OperationalError:  # not made yet, or locked
        return []
    return [
        Kept(number, state, when, None if point is None else int(point), pid)
        for number, state, when, point, pid in found
    ]


def states(folder: Path) -> Counter[str]:
    """How many trials are how, without those that have just been made."""
    return Counter(t.state for t in trials(folder) if t.owner is not None)


def complete(folder: Path) -> Counter[int | None]:
    """How often each point of the grid was done."""
    return Counter(t.grid_id for t in trials(folder) if t.state == "COMPLETE")


def times(folder: Path) -> dict[int, str | None]:
    return {t.number: t.completed for t in trials(folder) if t.state == "COMPLETE"}


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, errors) == (0, "")


def test_two_processes_share_a_storage_and_do_nothing_twice(start: Start, tmp_path: Path) -> None:
    for process in [start("--jobs", "1", "--steps", "100") for _ in range(2)]:
        finish(process)
    assert complete(tmp_path) == Counter(range(POINTS))
    assert len({t.owner for t in trials(tmp_path) if t.state == "COMPLETE"}) == 2, "one of them did everything"


def test_ctrl_c_leaves_no_process_and_a_study_to_go_on_with(start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "2", "--steps", "1000000")
    until(lambda: states(tmp_path)["RUNNING"] == 2)
    assert len(group(process.pid)) >= 3
    # A terminal sends it to every process that runs in it.
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert errors == (
        f"python -m benchmarks tuning: interrupted; 0 of {POINTS} trials are done, the same command goes on\n"
    )
    until(lambda: not group(process.pid))
    assert states(tmp_path) == {"FAIL": 2}


def test_killed_run_goes_on_without_repeating(start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "2", "--steps", "200")
    until(lambda: len(complete(tmp_path)) >= 3 and states(tmp_path)["RUNNING"] == 2)
    process.kill()
    process.wait()
    until(lambda: not group(process.pid))
    before = times(tmp_path)
    assert 3 <= len(before) < POINTS

    finish(start("--jobs", "2", "--steps", "200"))
    assert complete(tmp_path) == Counter(range(POINTS))
    assert before.items() <= times(tmp_path).items()


def test_an_error_in_a_worker_is_one_line_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    process = start("--jobs", "2", "--steps", "100", "--model", "cnn")  # of which the driver knows nothing
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors.startswith("python -m benchmarks tuning: error: a worker failed at Point(")
    assert errors.endswith("NotImplementedError: cnn; what was done is kept\n")
    assert errors.count("\n") == 1
    until(lambda: not group(process.pid))
    assert set(states(tmp_path)) == {"FAIL"}


def test_a_dead_worker_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "work", _die)
    assert main(["--jobs", "1", *GRID, "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "python -m benchmarks tuning: error: a worker died (exit status 3); what was done is kept\n"
    )


def test_a_storage_that_fails_on_the_way_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_study: SharedStudy) -> int:
        raise StorageInternalError("the server is gone\nand more")

    monkeypatch.setattr(SharedStudy, "done", fail)
    assert main(["--jobs", "1", *GRID, "--output", str(tmp_path)]) == 2
    url = f"sqlite:///{tmp_path / 'study.db'}"
    said = f"python -m benchmarks tuning: error: the storage {url} failed: the server is gone\n"
    assert capsys.readouterr().err == said


def _die(*_: object) -> None:
    os._exit(3)


@pytest.mark.slow
def test_real_workers_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # α = 1e30 diverges where no batch norm holds it.
    grid = ("--alphas", "0.1,1e30", "--betas", "0.99", "--seeds", "0,1", "--activation", "relu", "--steps", "12")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert main(["--jobs", "1", *grid, "--output", str(tmp_path), "--study", "s"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before

    results = load_results(tmp_path / "results.json")
    assert len(results.trials) == 8
    assert [machine["threads"] for machine in results.machines] == [1]
    found = {(t.point.alpha, t.point.batch_norm): t.diverged_at for t in results.trials}
    assert found[1e30, False] is not None
    assert found[0.1, False] is found[0.1, True] is None
    # The storage alone says the same.
    assert load_study(f"sqlite:///{tmp_path / 'study.db'}", "s") == results
    assert "Batch norm" in capsys.readouterr().out
