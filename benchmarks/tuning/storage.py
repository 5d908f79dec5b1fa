"""A study in a storage that several processes and machines share: who tries which point, and what came of it.

A point is claimed by writing down which it is and then looking whether anybody else has it; if so, it is given up and
another one taken. Of two who claim the same point, the one who wrote later sees the earlier: never do both keep it.
"""

import contextlib
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.rows import InputError
from benchmarks.tuning import owner
from benchmarks.tuning.results import Results, Trial
from benchmarks.tuning.sampler import TAKEN, SharedGridSampler, grid_id
from benchmarks.tuning.settings import Point, Settings

# Without a sign of life for so long, the trial of a process on another machine is taken over.
GRACE_S = 120.0
BEAT_S = 20.0
# A process that has created a trial says in the next moment whose it is; if not, it died there.
UNSIGNED_S = 10.0
# Seconds; a file is locked for as long as others write, a server answers or is not there.
TIMEOUTS = {"sqlite": {"timeout": 60}, "postgresql": {"connect_timeout": 10}, "mysql": {"connect_timeout": 10}}
# Of two processes that make the tables of a new storage at once, one is told one of these.
CREATED_MEANWHILE = ("already exists", "unique", "duplicate", "locked")
ATTEMPTS = 8
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
# What Optuna raises at a change of a trial that somebody else has finished.
FINISHED_MEANWHILE = (UpdateFinishedTrialError, ValueError)


@dataclass(frozen=True)
class Claim:
    """A point that this process alone is to try."""

    number: int
    point: Point


def shown(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return url


def connect(url: str) -> RDBStorage:
    for attempt in range(ATTEMPTS):
        try:
            backend = make_url(url).get_backend_name()
            return RDBStorage(url, engine_kwargs={"connect_args": TIMEOUTS.get(backend, {})})
        # Drivers raise what they like, and ImportError where they are missing.
        except Exception as error:
            reason = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
            if attempt == ATTEMPTS - 1 or not any(word in reason.lower() for word in CREATED_MEANWHILE):
                raise InputError(f"cannot use the storage {shown(url)}: {reason.splitlines()[0]}") from None
            time.sleep(random.uniform(0.1, 0.5))
    raise AssertionError


class SharedStudy:
    """One process's view of the study; it alone writes to it, for all its workers."""

    def __init__(self, url: str, name: str, settings: Settings) -> None:
        _quiet()
        self.settings = settings
        self._sampler = SharedGridSampler(settings.space)
        self._storage = connect(url)
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, sampler=self._sampler, direction="maximize", load_if_exists=True
        )
        found = self._study.user_attrs.get("settings")
        if found is None:
            self._study.set_user_attr("settings", settings.to_json())
        elif Settings.from_json(found) != settings:
            theirs, ours = Settings.from_json(found).to_json(), settings.to_json()
            different = ", ".join(field for field in ours if ours[field] != theirs[field])
            raise InputError(f"the study {name!r} in {shown(url)} has other {different}: choose another --study")
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in settings.space.items()
        }
        self._mine: dict[int, optuna.Trial] = {}
        self._signs: dict[int, tuple[Any, float]] = {}  # of others' trials: the last sign of life, when it was new
        self._beats = 0
        self._last_beat = time.monotonic()

    def close(self) -> None:
        _close(self._storage)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def done(self) -> int:
        return len({grid_id(trial) for trial in self._trials(TrialState.COMPLETE)})

    def claim(self) -> Claim | None:
        """A point that nobody has tried or is trying; None if there is none, or somebody else was faster."""
        if not self._sampler.open(self._study):
            return None
        trial = self._study.ask(self._distributions)
        trial.set_user_attr("owner", owner.this_process())
        taken = [t for t in self._trials(*TAKEN) if t.number != trial.number]
        mine = self._study.get_trials(deepcopy=False)[trial.number]
        if grid_id(mine) in {grid_id(t) for t in taken}:
            self._fail(trial.number)
            return None
        self._mine[trial.number] = trial
        return Claim(trial.number, Point(**trial.params))

    def finish(self, claim: Claim, result: Trial) -> None:
        """Keep a result; of a trial that was taken over meanwhile, the other's will be the same."""
        accuracy = result.correct[-1] / result.tests if result.correct and result.diverged_at is None else 0.0
        with contextlib.suppress(*FINISHED_MEANWHILE):
            self._mine.pop(claim.number).set_user_attr("result", result.to_json())
            self._study.tell(claim.number, accuracy)

    def give_up_all(self) -> None:
        """Open the points that are being tried here to others."""
        while self._mine:
            self._fail(self._mine.popitem()[0])

    def _fail(self, number: int) -> None:
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def beat(self) -> None:
        """A sign of life in each running trial, from time to time."""
        if time.monotonic() - self._last_beat < BEAT_S:
            return
        self._last_beat = time.monotonic()
        self._beats += 1
        for trial in self._mine.values():
            with contextlib.suppress(*FINISHED_MEANWHILE):
                trial.set_user_attr("beat", self._beats)

    def reopen_abandoned(self) -> int:
        """Give up the trials of processes that are dead or silent; tells how many are still running elsewhere."""
        running = [trial for trial in self._trials(TrialState.RUNNING) if trial.number not in self._mine]
        alive = 0
        for trial in running:
            if self._abandoned(trial):
                self._fail(trial.number)
            else:
                alive += 1
        return alive

    def _abandoned(self, trial: FrozenTrial) -> bool:
        whose = trial.user_attrs.get("owner")
        if whose is not None and owner.is_dead(whose):
            return True
        # Two machines' clocks may differ, so silence is timed here, from when it is first noticed.
        sign = (whose is not None, trial.user_attrs.get("beat"))
        now = time.monotonic()
        if trial.number not in self._signs or self._signs[trial.number][0] != sign:
            self._signs[trial.number] = (sign, now)
        silent = now - self._signs[trial.number][1]
        return silent > (UNSIGNED_S if whose is None else GRACE_S)

    def add_machine(self, machine: dict[str, Any]) -> None:
        kind = "machine " + ", ".join(f"{value}" for field, value in machine.items() if field != "date")
        if kind not in self._study.user_attrs:
            self._study.set_user_attr(kind, machine)

    def results(self) -> Results:
        return _results(self._study, self.settings)


def _results(study: optuna.Study, settings: Settings) -> Results:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    by_grid = {grid_id(trial): Trial.from_json(trial.user_attrs["result"]) for trial in trials}
    machines = [value for name, value in sorted(study.user_attrs.items()) if name.startswith("machine ")]
    return Results.of(settings, machines, list(by_grid.values()))


def load_study(url: str, name: str) -> Results:
    """The results of a study as far as it has come, changing nothing."""
    _quiet()
    _refuse_new_file(url)
    storage = connect(url)
    try:
        study = optuna.load_study(storage=storage, study_name=name)
        return _results(study, Settings.from_json(study.user_attrs["settings"]))
    except KeyError:
        raise InputError(f"the storage {shown(url)} has no tuning study {name!r}") from None
    finally:
        _close(storage)


def _refuse_new_file(url: str) -> None:
    """SQLite would make it."""
    with contextlib.suppress(SQLAlchemyError):
        parts = make_url(url)
        if parts.get_backend_name() == "sqlite" and parts.database and not Path(parts.database).exists():
            raise InputError(f"cannot use the storage {shown(url)}: no such file")


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def _quiet() -> None:
    optuna.logging.set_verbosity(logging.ERROR)
