"""Tune's schedulers, built from the settings and, where they learn from results, from a study.

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

from higgs_tune.config import SweepConfig
from higgs_tune.config_scheduler import hyperband
from higgs_tune.config_steps import grace_steps, perturb_steps
from higgs_tune.metrics import STEP, VAL_TEXT_NLL
from higgs_tune.sweep import space, study
from higgs_tune.sweep.guard import Guard
from higgs_tune.sweep.pausing import Brackets, Population


@dataclass(eq=False)
class Earlier:
    """A stand-in for a trial that an earlier run sampled, with all that a scheduler needs of it."""

    trial_id: str
    config = {"record": {"origin": "search"}}


class Asha(Guard, AsyncHyperBandScheduler):
    """Tune's ASHA, which leaves baselines alone."""


class Median(Guard, MedianStoppingRule):
    """Tune's median rule, with earlier runs' values and without trials that cannot be ranked.

    A trial that ended badly has no metric in its last result, on which Tune's rule would fail.
    """

    def __init__(self, **settings: Any) -> None:
        # An endless slice: with too few others to compare with, a trial continues instead of pausing.
        super().__init__(**settings, min_time_slice=cast(int, float("inf")))
        self.earlier: dict[str, dict[int, float]] = {}  # Tune's id → values in an earlier run

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a trial; a resumed one, or one of an earlier run, gets the values that it had."""
        super().on_trial_add(tune_controller, trial)
        values = self.earlier.pop(trial.trial_id, None)
        if values:
            results = [{STEP: step, VAL_TEXT_NLL: value} for step, value in sorted(values.items())]
            self._results[trial].extend(results)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Remember the last result of a trial that ended well; the rule has those of trials it stopped."""
        if VAL_TEXT_NLL in result and trial not in self._stopped_trials:
            super().on_trial_complete(tune_controller, trial, result)


def make_scheduler(config: SweepConfig, unfinished_steps: Iterable[int] = ()) -> TrialScheduler:
    """The scheduler of the search.

    Args:
        unfinished_steps: the steps from which the trials of an interrupted sweep continue.
    """
    scheduler, train = config.tune.scheduler, config.train
    if scheduler.name == "none":
        return FIFOScheduler()
    common: dict[str, Any] = {"metric": VAL_TEXT_NLL, "mode": "min"}
    if scheduler.name == "hyperband":
        band = hyperband(train.num_steps, config.past_warmup, scheduler.reduction_factor)
        return Brackets(band, VAL_TEXT_NLL)
    if scheduler.name == "median":
        return Median(
            time_attr=STEP,
            grace_period=grace_steps(config),
            min_samples_required=scheduler.min_samples,
            **common,
        )
    if scheduler.name == "pbt":
        every = perturb_steps(config)
        # Trials are compared at equal steps, so none may have passed the first comparison.
        first = max([grace_steps(config), *(step + 1 for step in unfinished_steps)])
        return Population(
            seed=space.trial_seed(config.tune.seed, "population"),
            rates=space.searched_rates(config),
            perturbation_interval=every,
            burn_in_period=-(-first // every) * every,
            quantile_fraction=scheduler.quantile_fraction,
            **common,
        )
    return Asha(
        time_attr=STEP,
        grace_period=grace_steps(config),
        max_t=train.num_steps,
        reduction_factor=scheduler.reduction_factor,
        **common,
    )


def replay(scheduler: TrialScheduler, tune_id: str, trial: FrozenTrial, *, ended: bool) -> None:
    """Show a scheduler the values that an earlier run of the sweep recorded, as if the trial ran now.

    ASHA's rungs and the median's averages are rebuilt. Brackets and a population consist of trials
    that still run, so they start over with the unfinished ones.

    Args:
        ended: whether the trial has ended; otherwise it continues as Tune's trial `tune_id`.
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
