"""A study in a storage: every point once, whoever works on it and however they end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tuning_canned import MACHINE, curve, trial

from benchmarks.rows import InputError
from benchmarks.tuning import owner, storage
from benchmarks.tuning.results import Results, Trial
from benchmarks.tuning.settings import Point, Settings
from benchmarks.tuning.storage import Claim, SharedStudy, load_study, shown

# Eight points, each in a transaction or two.
SETTINGS = Settings(steps=4, alphas=(0.1, 1.0), betas=(0.99,), seeds=(0, 1))
FOREIGN = {"host": "another machine", "pid": 1, "started": 1}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


@pytest.fixture
def study(url: str) -> Iterator[SharedStudy]:
    with closing(SharedStudy(url, "s", SETTINGS)) as opened:
        yield opened


def result(point: Point) -> Trial:
    return trial(point, curve(point))


def claim(study: SharedStudy) -> Claim:
    found = study.claim()
    assert found is not None
    return found


def work_off(study: SharedStudy) -> list[Point]:
    done = []
    while (found := study.claim()) is not None:
        study.finish(found, result(found.point))
        done.append(found.point)
    return done


def states(url: str) -> Counter[str]:
    loaded = optuna.load_study(study_name="s", storage=url)
    return Counter(t.state.name for t in loaded.trials)


def test_every_point_is_tried_once(study: SharedStudy, url: str) -> None:
    assert sorted(work_off(study)) == sorted(SETTINGS.points)
    assert study.done() == len(SETTINGS.points)
    assert states(url) == {"COMPLETE": len(SETTINGS.points)}


def test_storage_alone_gives_the_results(study: SharedStudy, url: str) -> None:
    work_off(study)
    study.add_machine(MACHINE)
    study.add_machine({**MACHINE, "date": "later"})
    assert load_study(url, "s") == Results.of(SETTINGS, [MACHINE], [result(point) for point in SETTINGS.points])


def test_a_diverged_trial_is_kept_as_complete(study: SharedStudy, url: str) -> None:
    found = claim(study)
    study.finish(found, trial(found.point, [95, 96]))
    (kept,) = optuna.load_study(study_name="s", storage=url).get_trials(states=(TrialState.COMPLETE,))
    assert kept.value == 0.0
    assert load_study(url, "s").trials[0].diverged_at == 3


def test_two_at_once_never_take_the_same(url: str) -> None:
    points: list[Point] = []
    barrier = threading.Barrier(2)

    def take_part() -> None:
        with closing(SharedStudy(url, "s", SETTINGS)) as mine:
            barrier.wait()
            while mine.done() < len(SETTINGS.points):
                points.extend(work_off(mine))

    threads = [threading.Thread(target=take_part) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(points) == sorted(SETTINGS.points)


def test_of_two_claims_on_one_point_the_later_gives_way(
    study: SharedStudy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claim(study)
    with closing(SharedStudy(url, "s", SETTINGS)) as other:
        # As if it had looked before `first` was written down.
        (taken,) = [t for t in other._study.get_trials() if t.number == first.number]
        monkeypatch.setattr(other._sampler, "before_trial", lambda study, new: _same_point(study, new, taken))
        assert other.claim() is None
    assert states(url) == {"RUNNING": 1, "FAIL": 1}
    study.finish(first, result(first.point))
    assert sorted([first.point, *work_off(study)]) == sorted(SETTINGS.points)


def _same_point(study: optuna.Study, new: optuna.trial.FrozenTrial, taken: optuna.trial.FrozenTrial) -> None:
    for name in ("search_space", "grid_id"):
        study._storage.set_trial_system_attr(new._trial_id, name, taken.system_attrs[name])


def test_what_was_given_up_is_open_again(study: SharedStudy, url: str) -> None:
    given_up = {claim(study).point, claim(study).point}
    study.give_up_all()
    with closing(SharedStudy(url, "s", SETTINGS)) as later:
        done = work_off(later)
    assert given_up <= set(done)
    assert len(done) == len(set(done)) == len(SETTINGS.points)


def test_the_dead_ones_trial_is_taken_over_at_once(
    study: SharedStudy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = {**owner.this_process(), "started": 12345}  # our id, but not the process that is running
    monkeypatch.setattr(owner, "this_process", lambda: killed)
    claim(study)
    monkeypatch.undo()
    with closing(SharedStudy(url, "s", SETTINGS)) as later:
        assert later.reopen_abandoned() == 0
        assert len(work_off(later)) == len(SETTINGS.points)


def test_the_living_ones_trial_is_left_alone(study: SharedStudy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = claim(study)
    with closing(SharedStudy(url, "s", SETTINGS)) as other:
        monkeypatch.setattr(storage, "GRACE_S", 1000.0)
        assert other.reopen_abandoned() == 1
        assert found.point not in work_off(other)


def test_a_silent_machine_is_given_up_and_one_that_beats_is_not(
    study: SharedStudy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(owner, "this_process", lambda: FOREIGN)
    study._last_beat = clock[0]
    found = claim(study)
    with closing(SharedStudy(url, "s", SETTINGS)) as other:
        for _ in range(3):
            assert other.reopen_abandoned() == 1
            clock[0] += storage.GRACE_S - 1
            study.beat()
        assert other.reopen_abandoned() == 1
        clock[0] += storage.GRACE_S + 1
        assert other.reopen_abandoned() == 0
        done = work_off(other)
    assert found.point in done
    # It was only slow: its result, which is the same, comes too late and harms nothing.
    study.finish(found, result(found.point))
    study.beat()
    assert states(url) == {"FAIL": 1, "COMPLETE": len(SETTINGS.points)}
    assert len(load_study(url, "s").trials) == len(SETTINGS.points)


def test_another_grid_under_the_same_name_is_refused(study: SharedStudy, url: str) -> None:
    other = Settings(steps=4, alphas=(0.5,), betas=(0.99,), seeds=(0, 1))
    with pytest.raises(InputError, match="other alphas"):
        SharedStudy(url, "s", other)


def test_a_study_that_is_not_there_is_named(study: SharedStudy, url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tuning study 'another'"):
        load_study(url, "another")
    with pytest.raises(InputError, match="no such file"):
        load_study(f"sqlite:///{tmp_path / 'nothing.db'}", "s")
    assert not (tmp_path / "nothing.db").exists()


def test_a_password_is_not_shown() -> None:
    assert "secret" not in shown("postgresql://me:secret@host/study")
    with pytest.raises(InputError) as raised:
        SharedStudy("postgresql+nodriver://me:secret@host/study", "s", SETTINGS)
    assert "secret" not in str(raised.value)
