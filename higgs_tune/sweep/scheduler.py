"""Early stopping: ASHA, set up from the settings and rebuilt from a study."""

from types import SimpleNamespace
from typing import Any, cast

from optuna.trial import FrozenTrial
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from higgs_tune.config import SchedulerSettings, TrainSettings
from higgs_tune.metrics import STEP, VAL_TEXT_NLL


def grace_steps(scheduler: SchedulerSettings, train: TrainSettings) -> int:
    """The first rung: a step at which trials report, beyond warm-up, at most num_steps."""
    interval = train.report_every_steps
    wanted = max(1, round(scheduler.grace_fraction * train.num_steps / interval))
    past_warmup = int(train.warmup_fraction * train.num_steps) // interval + 1
    return min(max(wanted, past_warmup) * interval, train.num_steps)


def make_scheduler(scheduler: SchedulerSettings, train: TrainSettings) -> TrialScheduler:
    """ASHA over optimizer steps, or no early stopping."""
    if scheduler.name == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr=STEP,
        metric=VAL_TEXT_NLL,
        mode="min",
        grace_period=grace_steps(scheduler, train),
        max_t=train.num_steps,
        reduction_factor=scheduler.reduction_factor,
    )


def replay(scheduler: TrialScheduler, tune_id: str, trial: FrozenTrial) -> None:
    """Show a scheduler the values that an earlier run of the sweep recorded, as if it had run it.

    Only the public hooks are used, and of a trial only its id, which is all that ASHA reads.
    """
    if not isinstance(scheduler, AsyncHyperBandScheduler):
        return
    stand_in = cast(Trial, SimpleNamespace(trial_id=tune_id))
    controller: Any = None
    scheduler.on_trial_add(controller, stand_in)
    for step, value in sorted(trial.intermediate_values.items()):
        scheduler.on_trial_result(controller, stand_in, {STEP: step, VAL_TEXT_NLL: value})
