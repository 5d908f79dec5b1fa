"""A study that processes and machines share through an Optuna storage; Optuna's GridSampler assigns the points.

An interrupted trial stays unfinished. Its point is assigned again once every other point has been started, so the last
points may be tried twice; both results are the same, and one counts.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import GridSampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.command import end_with_parent, error_summary, processes, signals_to_end
from benchmarks.progress import ProgressBar
from studies.tuning.results import Results, Trial
from studies.tuning.settings import Point, Settings

POLL_S = 0.5
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)


class WorkerError(BaseException):
    """A trial raised; the message has one line.

    It is no Exception, for which Optuna would record a failed trial and never try its point again.
    """


@contextmanager
def opened(url: str, name: str, settings: Settings) -> Iterator[optuna.Study]:
    """A study, created if missing, whose points are assigned. Its name identifies its settings."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RDBStorage(url)
    try:
        yield optuna.create_study(
            storage=storage,
            sampler=GridSampler(settings.space, seed=0),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
    finally:
        storage.remove_session()
        storage.engine.dispose()


def results(study: optuna.Study) -> dict[Point, Trial]:
    """The results so far."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found = (Trial.from_json(trial.user_attrs["result"]) for trial in complete)
    return {trial.point: trial for trial in found}


def results_of(study: optuna.Study, settings: Settings) -> Results:
    machines = [value for name, value in sorted(study.user_attrs.items()) if name.startswith("machine ")]
    return Results.of(settings, machines, list(results(study).values()))


# A worker.


def begin() -> None:
    """Runs first in a new process: each worker has one core, so libraries must not start threads."""
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
    point = settings.point(**{name: trial.suggest_categorical(name, values) for name, values in settings.space.items()})
    try:
        result = run_trial(settings, point)
        trial.set_user_attr("result", result.to_json())
    except Exception as error:
        raise WorkerError(f"a worker failed: {error_summary(error)}") from None
    return result.correct[-1] / result.tests if result.correct and result.diverged_at is None else 0.0


def work(url: str, name: str, settings: Settings) -> None:
    """Try points until every one has a result, from this worker or another."""
    with opened(url, name, settings) as study:
        add_machine(study, this_machine())
        if len(results(study)) < len(settings.points):
            study.optimize(partial(objective, settings))


def run(url: str, name: str, settings: Settings, jobs: int) -> Results:
    """Run the rest of a study with ``jobs`` workers, all of which have ended on return.

    Raises WorkerError, or KeyboardInterrupt on a signal to end.
    """
    with signals_to_end() as received, opened(url, name, settings) as study:
        total = len(settings.points)
        calls = [(url, name, settings)] * min(jobs, total - len(results(study)))
        with ProgressBar(total) as progress, processes(work, calls, begin) as pending:
            while pending:
                if received:
                    raise KeyboardInterrupt
                ended, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                done = len(results(study))
                progress.show_total(f"{done} of {total} trials", done)
        return results_of(study, settings)
