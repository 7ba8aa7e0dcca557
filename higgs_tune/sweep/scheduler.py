"""Tune's schedulers, set up from the settings, and rebuilt from a study where they learn from it.

Schedulers that pause trials are in `sweep.pausing`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from optuna.trial import FrozenTrial
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from higgs_tune.config import SchedulerSettings, SweepConfig, TrainSettings
from higgs_tune.config_scheduler import hyperband
from higgs_tune.metrics import STEP, VAL_TEXT_NLL
from higgs_tune.sweep import space, study
from higgs_tune.sweep.guard import Guard
from higgs_tune.sweep.pausing import Brackets, Population


@dataclass(eq=False)
class Earlier:
    """Stands for a trial that an earlier run sampled: all that a scheduler knows of it."""

    trial_id: str
    config = {"record": {"origin": "search"}}


class Asha(Guard, AsyncHyperBandScheduler):
    """Tune's ASHA beside the baselines."""


class Median(Guard, MedianStoppingRule):
    """Tune's median rule without trials that cannot be ranked, and with what earlier runs recorded.

    A trial that did not end well has no metric in its last result, for which Tune's would fall.
    """

    def __init__(self, **settings: Any) -> None:
        # An endless slice: where too few others are there to compare with, nobody yields.
        super().__init__(**settings, min_time_slice=cast(int, float("inf")))
        self.earlier: dict[str, dict[int, float]] = {}  # Tune's id → values in an earlier run

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Give a resumed trial, or one of an earlier run, the values that it had."""
        super().on_trial_add(tune_controller, trial)
        values = self.earlier.pop(trial.trial_id, None)
        if values:
            results = [{STEP: step, VAL_TEXT_NLL: value} for step, value in sorted(values.items())]
            self._results[trial].extend(results)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Remember the last result of a trial that ended well; that of one it stopped is known."""
        if VAL_TEXT_NLL in result and trial not in self._stopped_trials:
            super().on_trial_complete(tune_controller, trial, result)


def grace_steps(scheduler: SchedulerSettings, train: TrainSettings) -> int:
    """The first step at which a trial is judged: it reports there, beyond warm-up."""
    interval = train.report_every_steps
    wanted = round(scheduler.grace_fraction * train.num_steps / interval) * interval
    return min(max(wanted, train.past_warmup), train.num_steps)


def perturb_steps(scheduler: SchedulerSettings, train: TrainSettings) -> int:
    """How many steps lie between two copyings of a population."""
    return scheduler.perturb_every_steps or grace_steps(scheduler, train)


def num_checkpoints(config: SweepConfig) -> int:
    """How many checkpoints must be kept of each trial.

    Until a copying trial has read the donor's, the donor reaches the next copying at most. One is to
    spare.
    """
    if config.tune.scheduler.name != "pbt":
        return 1
    every = perturb_steps(config.tune.scheduler, config.train)
    return -(-every // config.train.report_every_steps) + 2


def make_scheduler(config: SweepConfig, unfinished_steps: Iterable[int] = ()) -> TrialScheduler:
    """The scheduler of the search.

    Args:
        unfinished_steps: the steps from which the trials of an interrupted sweep go on.
    """
    scheduler, train = config.tune.scheduler, config.train
    if scheduler.name == "none":
        return FIFOScheduler()
    common: dict[str, Any] = {"metric": VAL_TEXT_NLL, "mode": "min"}
    if scheduler.name == "hyperband":
        band = hyperband(train.num_steps, train.past_warmup, scheduler.reduction_factor)
        return Brackets(band, VAL_TEXT_NLL)
    if scheduler.name == "median":
        return Median(
            time_attr=STEP,
            grace_period=grace_steps(scheduler, train),
            min_samples_required=scheduler.min_samples,
            **common,
        )
    if scheduler.name == "pbt":
        every = perturb_steps(scheduler, train)
        # Trials are compared at equal steps, so nobody may have passed the first comparison.
        first = max([grace_steps(scheduler, train), *(step + 1 for step in unfinished_steps)])
        return Population(
            seed=space.trial_seed(config.tune.seed, "population"),
            ranges=space.rate_ranges(config),
            perturbation_interval=every,
            burn_in_period=-(-first // every) * every,
            quantile_fraction=scheduler.quantile_fraction,
            **common,
        )
    return Asha(
        time_attr=STEP,
        grace_period=grace_steps(scheduler, train),
        max_t=train.num_steps,
        reduction_factor=scheduler.reduction_factor,
        **common,
    )


def replay(scheduler: TrialScheduler, tune_id: str, trial: FrozenTrial, *, ended: bool) -> None:
    """Show a scheduler the values that an earlier run of the sweep recorded, as if it had run it.

    ASHA's rungs and the median's averages are rebuilt. Brackets and a population consist of trials
    that still run, so they begin anew with the unfinished ones.

    Args:
        ended: the trial has ended, else it goes on as Tune's trial `tune_id`.
    """
    if study.record_of(trial).origin != "search":
        return
    stand_in, controller = cast(Trial, Earlier(tune_id)), cast(Any, None)
    if isinstance(scheduler, Median | Brackets):
        scheduler.earlier[tune_id] = trial.intermediate_values
    if isinstance(scheduler, Asha) or (isinstance(scheduler, Median) and ended):
        scheduler.on_trial_add(controller, stand_in)
    if isinstance(scheduler, Asha):
        for step, value in sorted(trial.intermediate_values.items()):
            scheduler.on_trial_result(controller, stand_in, {STEP: step, VAL_TEXT_NLL: value})
