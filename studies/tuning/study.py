"""A study that processes and machines share through a storage of Optuna's, whose GridSampler hands out the points.

A trial that was interrupted stays unfinished. Its point is handed out again once every other has been started, so the
last ones may be tried twice; both results are the same, and one counts.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.command import end_with_parent, error_summary, processes
from benchmarks.progress import ProgressBar
from benchmarks.rows import InputError
from studies.tuning.results import Results, Trial
from studies.tuning.settings import Point, Settings

POLL_S = 0.5

# Seconds; a file is locked for as long as others write, a server answers or is not there.
TIMEOUTS = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}, "mysql": {"connect_timeout": 10}}
# Of two processes that make the tables of a new storage at once, one is told one of these.
CREATED_MEANWHILE = ("already exists", "unique", "duplicate", "locked")
ATTEMPTS = 8
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerError(BaseException):
    """A worker died, or its code raised; the message is one line.

    No Exception, as of one Optuna would note that the trial has failed, and never try its point again.
    """


def shown(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url


def connect(url: str) -> RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for attempt in range(ATTEMPTS):
        try:
            timeouts = TIMEOUTS.get(make_url(url).get_backend_name(), {})
            return RDBStorage(url, engine_kwargs={"connect_args": timeouts})
        except Exception as error:  # drivers raise what they like, and ImportError where they are missing
            reason = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
            if attempt == ATTEMPTS - 1 or not any(word in reason.lower() for word in CREATED_MEANWHILE):
                raise InputError(f"cannot use the storage {shown(url)}: {reason.splitlines()[0]}") from None
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


@contextmanager
def connected(url: str) -> Iterator[RDBStorage]:
    storage = connect(url)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def opened(url: str, name: str, settings: Settings | None = None) -> Iterator[optuna.Study]:
    """A study that is there; with settings, whose points are handed out. Raises InputError where it is not there."""
    with connected(url) as storage:
        try:
            sampler = GridSampler(settings.space, seed=0) if settings else None
            study = optuna.load_study(storage=storage, study_name=name, sampler=sampler)
        except KeyError:
            raise InputError(f"the storage {shown(url)} has no tuning study {name!r}") from None
        yield study


def prepare(url: str, name: str, settings: Settings) -> None:
    """Make the study, if it is not there; raises InputError where the study of this name has other settings."""
    with connected(url) as storage:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        ours, theirs = settings.to_json(), study.user_attrs.get("settings")
        if theirs is None:
            study.set_user_attr("settings", ours)
        elif Settings.from_json(theirs) != settings:
            theirs = Settings.from_json(theirs).to_json()
            different = ", ".join(field for field in ours if ours[field] != theirs[field])
            raise InputError(f"the study {name!r} in {shown(url)} has other {different}: choose another --study")


def results(study: optuna.Study) -> dict[Point, Trial]:
    """What is done so far."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {Point(**trial.params): Trial.from_json(trial.user_attrs["result"]) for trial in complete}


def results_of(study: optuna.Study) -> Results:
    machines = [value for name, value in sorted(study.user_attrs.items()) if name.startswith("machine ")]
    return Results.of(Settings.from_json(study.user_attrs["settings"]), machines, list(results(study).values()))


def load_study(url: str, name: str) -> Results:
    """The results of a study as far as it has come; raises InputError rather than make a file."""
    with suppress(SQLAlchemyError):
        parts = make_url(url)
        if parts.get_backend_name() == "sqlite" and parts.database and not Path(parts.database).exists():
            raise InputError(f"cannot use the storage {shown(url)}: no such file")
    with opened(url, name) as study:
        return results_of(study)


# A worker.


def begin() -> None:
    """In a new process, before anything else: as each worker has a core, no library starts threads of its own."""
    end_with_parent(signal.SIGTERM)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def run_trial(settings: Settings, point: Point) -> Trial:
    from studies.tuning.training import train  # torch is for workers alone

    return train(settings, point)


def this_machine() -> dict[str, Any]:
    import torch

    from benchmarks.provenance import provenance

    torch.set_num_threads(1)
    return asdict(provenance(threads=1))


def add_machine(study: optuna.Study, machine: dict[str, Any]) -> None:
    kind = "machine " + ", ".join(f"{value}" for field, value in machine.items() if field != "date")
    if kind not in study.user_attrs:
        study.set_user_attr(kind, machine)


def objective(settings: Settings, trial: optuna.Trial) -> float:
    """The accuracy at the end, 0 where it diverged."""
    point = Point(**{name: trial.suggest_categorical(name, values) for name, values in settings.space.items()})
    try:
        result = run_trial(settings, point)
        trial.set_user_attr("result", result.to_json())
    except Exception as error:
        raise WorkerError(f"a worker failed: {error_summary(error)}") from None
    return result.correct[-1] / result.tests if result.correct and result.diverged_at is None else 0.0


def work(url: str, name: str, settings: Settings) -> None:
    """Try points until every one has a result, here or elsewhere."""
    try:
        with opened(url, name, settings) as study:
            add_machine(study, this_machine())
            if len(results(study)) < len(settings.points):
                study.optimize(lambda trial: objective(settings, trial))
    except Exception as error:
        raise WorkerError(f"a worker failed: {error_summary(error)}") from None


def run(url: str, name: str, settings: Settings, jobs: int) -> Results:
    """Run what is left of a study with so many workers; on leaving none of them is left.

    Raises WorkerError, or KeyboardInterrupt on a signal to end.
    """
    with noted_signals() as came:
        prepare(url, name, settings)
        with opened(url, name) as study:
            total = len(settings.points)
            left = total - len(results(study))
            calls = [(url, name, settings)] * min(jobs, left)
            with ProgressBar(total) as progress, processes(work, calls, begin) as pending:
                while pending:
                    ended, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                    if came:
                        raise KeyboardInterrupt
                    try:
                        for future in ended:
                            future.result()
                    except BrokenProcessPool:
                        raise WorkerError("a worker died") from None
                    done = len(results(study))
                    progress.show_total(f"{done} of {total} trials", done)
            return results_of(study)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, a signal to end is noted, and the same again ends at once: a database's driver may swallow exceptions."""
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    # Under nohup, a terminal's end is to be ignored.
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
