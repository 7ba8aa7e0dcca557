"""A mixin for Tune's schedulers that leaves baselines alone and makes a decision to stop final."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler


class Guard(TrialScheduler):
    """Mixin in front of a Tune scheduler, which never sees the baselines: they run their whole budget.

    Baselines start first and usually do badly. As the first results at a rung of ASHA, theirs would
    let nearly every trial pass.

    Tune stops a trial once its checkpoint is stored. If the trial's process dies before that, the trial
    restarts and reports the same result again. Tune's schedulers would then let it train on, or fail.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._stopped: set[Trial] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on a new trial unless it is a baseline; likewise below."""
        if is_searched(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on that a trial failed."""
        if is_searched(trial):
            super().on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """CONTINUE for a baseline, else the scheduler's decision; STOP is final."""
        if not is_searched(trial):
            return TrialScheduler.CONTINUE
        if trial in self._stopped:
            return TrialScheduler.STOP
        decision = super().on_trial_result(tune_controller, trial, result)
        is_replay = tune_controller is None  # which shows all of a trial's earlier results
        if decision == TrialScheduler.STOP and not is_replay:
            self._stopped.add(trial)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass on that a trial ended by itself."""
        if is_searched(trial):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Pass on that a trial was stopped."""
        if is_searched(trial):
            super().on_trial_remove(tune_controller, trial)


def is_searched(trial: Trial) -> bool:
    """Whether a trial's configuration was sampled, so that it is not a baseline."""
    return trial.config["record"]["origin"] == "search"
