"""What stands before every scheduler: baselines are left alone, and a decision to stop stays one."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler


class Guard(TrialScheduler):
    """Goes before a scheduler of Tune: baselines run their whole budget, and it never sees them.

    They start first and do badly, as a rule: among the first results at a rung of ASHA, theirs would
    let nearly everyone pass.

    Tune stops a trial once its checkpoint is there. If its process dies before that, the trial comes
    back with the same result; a scheduler of Tune that is asked twice lets it train on, or fails.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._told_to_stop: set[Trial] = set()

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a trial in, if it is not a baseline; likewise below."""
        if is_searched(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial failed."""
        if is_searched(trial):
            super().on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Continue, or what the scheduler decides, once."""
        if not is_searched(trial):
            return TrialScheduler.CONTINUE
        if trial in self._told_to_stop:
            return TrialScheduler.STOP
        decision = super().on_trial_result(tune_controller, trial, result)
        is_replay = tune_controller is None  # which shows all that a trial had
        if decision == TrialScheduler.STOP and not is_replay:
            self._told_to_stop.add(trial)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial ended by itself."""
        if is_searched(trial):
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial was stopped."""
        if is_searched(trial):
            super().on_trial_remove(tune_controller, trial)


def is_searched(trial: Trial) -> bool:
    """Whether a trial's configuration was sampled: it is no baseline."""
    return trial.config["record"]["origin"] == "search"
