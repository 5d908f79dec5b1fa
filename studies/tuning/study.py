"""A study that processes and machines share through a storage of Optuna's.

Every point of the grid is enqueued as a trial, which the storage hands to one worker alone. A worker tells it at
intervals that it lives (Optuna's heartbeat), and the points of those that have fallen silent are enqueued again; so are
those of an interrupted run, when it goes on.
"""

import os
import random
import signal
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.command import end_with_parent, error_summary, without_interrupts
from benchmarks.progress import ProgressBar
from benchmarks.rows import InputError
from studies.tuning.results import Results, Trial
from studies.tuning.settings import Point, Settings

HEARTBEAT_S = 10
GRACE_S = 30  # without a sign of life for so long, a trial is enqueued again
# A process may also die between taking a trial and its first heartbeat, which is then never missed.
PATIENCE_S = 2 * GRACE_S
POLL_S = 0.5

# Seconds; a file is locked for as long as others write, a server answers or is not there.
TIMEOUTS = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}, "mysql": {"connect_timeout": 10}}
# Of two processes that make the tables of a new storage at once, one is told one of these.
CREATED_MEANWHILE = ("already exists", "unique", "duplicate", "locked")
ATTEMPTS = 8
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(Exception):
    """A worker died, or its code raised; the message is one line."""


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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return RDBStorage(
                    url,
                    engine_kwargs={"connect_args": timeouts},
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
                )
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
def opened(url: str, name: str) -> Iterator[optuna.Study]:
    """A study that is there; raises InputError where it is not."""
    with connected(url) as storage:
        try:
            study = optuna.load_study(storage=storage, study_name=name)
        except KeyError:
            raise InputError(f"the storage {shown(url)} has no tuning study {name!r}") from None
        yield study


def prepare(url: str, name: str, settings: Settings) -> None:
    """Make the study, or go on with it: what is neither done, nor waits, nor runs is enqueued.

    Raises InputError where the study of this name has other settings.
    """
    with connected(url) as storage:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        ours, theirs = settings.to_json(), study.user_attrs.get("settings")
        if theirs is None:
            study.set_user_attr("settings", ours)
        elif Settings.from_json(theirs) != settings:
            theirs = Settings.from_json(theirs).to_json()
            different = ", ".join(field for field in ours if ours[field] != theirs[field])
            raise InputError(f"the study {name!r} in {shown(url)} has other {different}: choose another --study")
        enqueue(study, missing(study, settings, TrialState.COMPLETE, TrialState.WAITING, TrialState.RUNNING))


def missing(study: optuna.Study, settings: Settings, *states: TrialState) -> list[Point]:
    """The points of the grid that have no trial in one of the states."""
    found = study.get_trials(deepcopy=False, states=states)
    points = {Point(**trial.user_attrs["point"]) for trial in found if "point" in trial.user_attrs}
    return [point for point in settings.points if point not in points]


def unfinished(study: optuna.Study, settings: Settings) -> list[Point]:
    return missing(study, settings, TrialState.COMPLETE)


def enqueue(study: optuna.Study, points: Iterable[Point]) -> None:
    for point in points:
        study.enqueue_trial(asdict(point), user_attrs={"point": asdict(point)})


def results_of(study: optuna.Study) -> Results:
    """What is done so far. Where a point was tried twice both results are the same, and one counts."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = {Point(**trial.user_attrs["point"]): trial.user_attrs["result"] for trial in complete}
    machines = [value for name, value in sorted(study.user_attrs.items()) if name.startswith("machine ")]
    return Results.of(
        Settings.from_json(study.user_attrs["settings"]), machines, list(map(Trial.from_json, trials.values()))
    )


def load_study(url: str, name: str) -> Results:
    """The results of a study as far as it has come; raises InputError rather than make a file."""
    with suppress(SQLAlchemyError):
        parts = make_url(url)
        if parts.get_backend_name() == "sqlite" and parts.database and not Path(parts.database).exists():
            raise InputError(f"cannot use the storage {shown(url)}: no such file")
    with opened(url, name) as study:
        return results_of(study)


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


def attempt(study: optuna.Study, settings: Settings, run: str, trial: optuna.Trial) -> float:
    """Optuna's objective: the accuracy at the end, 0 where it diverged."""
    if "point" not in trial.user_attrs:
        raise optuna.TrialPruned  # another worker was faster, and nothing is enqueued any more
    trial.set_user_attr("run", run)
    point = Point(**{name: trial.suggest_categorical(name, values) for name, values in settings.space.items()})
    if point not in unfinished(study, settings):
        raise optuna.TrialPruned
    result = run_trial(settings, point)
    trial.set_user_attr("result", result.to_json())
    return result.correct[-1] / result.tests if result.correct and result.diverged_at is None else 0.0


def work_off(study: optuna.Study, settings: Settings, run: str) -> None:
    """Try what is enqueued until every point has a result, here or elsewhere; ``run`` says whose the trials are."""
    busy = time.monotonic()
    while unfinished(study, settings):
        if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.optimize(lambda trial: attempt(study, settings, run, trial), n_trials=1)
            busy = time.monotonic()
            continue
        if time.monotonic() - busy > PATIENCE_S:
            enqueue(study, missing(study, settings, TrialState.COMPLETE, TrialState.WAITING))
            busy = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(study)
        time.sleep(POLL_S)


def work(url: str, name: str, settings: Settings, run: str, failures: Any) -> None:
    """A worker's main function: it ends when all is done, when it is killed, and when its parent ends."""
    end_with_parent(signal.SIGTERM)
    try:
        with opened(url, name) as study:
            add_machine(study, this_machine())
            work_off(study, settings, run)
    except Exception as error:
        failures.put(error_summary(error))
        sys.exit(1)


def run(url: str, name: str, settings: Settings, jobs: int) -> Results:
    """Run what is left of a study with so many workers; on leaving none of them is left.

    Raises WorkerError, or KeyboardInterrupt on a signal to end.
    """
    with noted_signals() as came:
        prepare(url, name, settings)
        with opened(url, name) as study:
            left = len(unfinished(study, settings))
            context = get_context("spawn")
            failures, token = context.SimpleQueue(), uuid.uuid4().hex
            arguments = (url, name, settings, token, failures)
            workers = [context.Process(target=work, args=arguments, daemon=True) for _ in range(min(jobs, left))]
            try:
                with one_thread_each(), without_interrupts():
                    for worker in workers:
                        worker.start()
                watch(study, settings, workers, failures, came)
            finally:
                # There is nothing in a worker that would have to be put in order, but for what it was trying.
                for worker in filter(lambda worker: worker.pid, workers):
                    worker.kill()
                    worker.join()
                give_up(study, token)
            return results_of(study)


def watch(study: optuna.Study, settings: Settings, workers: list[Any], failures: Any, came: list[int]) -> None:
    """Until the workers have ended, show how far the study is."""
    total = len(settings.points)
    with ProgressBar(total) as progress:
        while alive := [worker.sentinel for worker in workers if worker.is_alive()]:
            done = total - len(unfinished(study, settings))
            progress.show_total(f"{done} of {total} trials", done)
            wait(alive, POLL_S)
            if came:
                raise KeyboardInterrupt
            require_alive(workers, failures)
    require_alive(workers, failures)


def give_up(study: optuna.Study, token: str) -> None:
    """Fail the trials that a run has left, so that the next one need not wait until they have fallen silent."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.user_attrs.get("run") == token:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def require_alive(workers: Iterable[Any], failures: Any) -> None:
    for worker in workers:
        if worker.exitcode:
            died = f"a worker died (exit status {worker.exitcode})"
            raise WorkerError(died if failures.empty() else f"a worker failed: {failures.get()}")


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


@contextmanager
def one_thread_each() -> Iterator[None]:
    """As each worker has a core, no library starts threads of its own."""
    unset = [name for name in THREAD_LIMITS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]
