"""Optuna's GridSampler for several processes that take trials by ask() and may be killed at any time."""

from collections.abc import Sequence

from optuna.samplers import GridSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

# A failed trial was given up, by Ctrl-C or a kill: its point is open again, which to Optuna it would not be.
TAKEN = (TrialState.COMPLETE, TrialState.RUNNING)


def grid_id(trial: FrozenTrial) -> int | None:
    return trial.system_attrs.get("grid_id")


class SharedGridSampler(GridSampler):
    def open(self, study: Study) -> list[int]:
        """The points that are neither done nor being tried."""
        trials = study.get_trials(deepcopy=False, states=TAKEN)
        return sorted(set(range(len(self._all_grids))) - {grid_id(trial) for trial in trials})

    def _get_unvisited_grid_ids(self, study: Study) -> list[int]:
        return self.open(study)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """GridSampler stops study.optimize() here, which is not what runs."""
