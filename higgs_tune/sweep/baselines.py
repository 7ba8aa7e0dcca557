"""Schedulers leave the configurations set by hand alone: the others are compared with them."""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler


class SparesBaselines(TrialScheduler):
    """Goes before a scheduler of Tune: baselines run their whole budget, and it never sees them.

    They start first and do badly, as a rule: among the first results at a rung of ASHA, theirs would
    let nearly everyone pass.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a trial in, if it is not a baseline; likewise below."""
        if is_searched(trial):
            super().on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial failed."""
        if is_searched(trial):
            super().on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Continue, or what the scheduler decides."""
        if is_searched(trial):
            return super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE

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
