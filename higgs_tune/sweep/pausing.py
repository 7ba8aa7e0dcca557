"""Schedulers that pause trials: HyperBand's brackets, and a population that copies its best.

Both reach `sweep.source` inside the ConcurrencyLimiter that Tune puts around it. A paused trial takes
no seat at a worker, and one that may continue waits for a free seat.
"""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from higgs_tune.config_space import Range
from higgs_tune.metrics import STEP
from higgs_tune.sweep.guard import Guard, is_searched
from higgs_tune.sweep.hyperband import HyperBand

RATES = "rates"  # what a population changes, in the config of a Tune trial


class Pausing(Guard):
    """Mixin in front of a scheduler that pauses trials."""

    _keeps = False

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a trial; before the first, let Tune keep as many idle processes as may run.

        By itself, Tune keeps idle processes only for trials that it has decided to start, or a single one.
        Starting a process takes seconds, and all trials of a bracket or population pause at the same step.
        """
        if not self._keeps and tune_controller is not None:
            cache = tune_controller._tune_controller._actor_cache  # there is no public API
            num_processes = tune_controller.search_alg.searcher.max_concurrent
            cache.increase_max(trial.placement_group_factory, num_processes)
            self._keeps = True
        # Tune's population refuses searchers, because they would get results for a configuration that is
        # no longer the one that trained; ours is told of every copy.
        view: Any = SimpleNamespace(search_alg=None)
        super().on_trial_add(view, trial)


class Brackets(Pausing, HyperBand):
    """HyperBand that leaves baselines alone."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial that may run, or None until there is a free seat for it."""
        trial = super().choose_trial_to_run(tune_controller)
        return trial if has_room(tune_controller, trial) else None


class Population(Pausing, PopulationBasedTraining):
    """Population based training: at equal steps the worst trials copy the best and change their rates.

    Synchronous, so that trials are compared at the same step, a sweep is repeatable, and a donor's
    checkpoint is the one it was ranked by. Tune's own synchronous mode would wait for ever for a trial
    that diverged or failed, and would clone a trial while it is being saved, after which Tune stops it.
    So here nothing happens until all trials that are left have been paused.

    The baselines run beside the population: as copies they would no longer be baselines.
    """

    def __init__(
        self,
        *,
        seed: int,
        rates: Mapping[str, Range | tuple[float, ...]],
        perturbation_interval: int,
        burn_in_period: int,
        quantile_fraction: float,
        **metric: Any,
    ) -> None:
        self._seed = seed
        self._ranges = {name: rate for name, rate in rates.items() if isinstance(rate, Range)}
        super().__init__(
            time_attr=STEP,
            perturbation_interval=perturbation_interval,
            burn_in_period=burn_in_period,
            quantile_fraction=quantile_fraction,
            hyperparam_mutations={RATES: {name: mutation(rate) for name, rate in rates.items()}},
            custom_explore_fn=self._bounded,
            log_config=False,  # the trials' own files have it
            synch=True,
            **metric,
        )

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pause a trial that has reached the step at which all are compared."""
        if not is_searched(trial) or result[STEP] < self._next_perturbation_sync:
            return TrialScheduler.CONTINUE
        self._save_trial_state(self._trial_state[trial], result[STEP], result, trial)
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Compare and copy once all are paused; returns the trial to run, which has trained least."""
        members = [trial for trial in tune_controller.get_trials() if is_searched(trial)]
        left = [trial for trial in members if not trial.is_finished()]
        if left and all(trial.status == Trial.PAUSED for trial in left):
            states = [self._trial_state[trial] for trial in left]
            if all(state.last_train_time >= self._next_perturbation_sync for state in states):
                self._compare(tune_controller, left)
        view: Any = SimpleNamespace(get_trials=lambda: members)
        chosen = super().choose_trial_to_run(view)
        return chosen if has_room(tune_controller, chosen) else None

    def _compare(self, tune_controller: Any, left: list[Trial]) -> None:
        """Let the worst trials copy the best, tell the searcher, and let all continue."""
        source = tune_controller.search_alg.searcher.searcher
        step = self._next_perturbation_sync
        before = {trial: trial.config for trial in left}
        last = left[-1]
        view: Any = SimpleNamespace(get_trials=lambda: left, get_live_trials=lambda: left)
        with seeded(f"{self._seed}:{step}"):
            super().on_trial_result(view, last, self._trial_state[last].last_result or {})
        for trial in left:
            if trial.config is not before[trial]:  # it is the donor's now
                config = source.copied(
                    trial.trial_id, trial.config["id"], trial.config[RATES], step
                )
                trial.set_config(config)
        for trial in left:
            source.on_unpause(trial.trial_id)

    def _bounded(self, config: dict[str, Any]) -> dict[str, Any]:
        """Keep changed rates within the search space."""
        for name, bounds in self._ranges.items():
            config[RATES][name] = min(max(config[RATES][name], bounds.low), bounds.high)
        return config


def has_room(tune_controller: Any, trial: Trial | None) -> bool:
    """Whether a trial may run now; only a paused one needs a free seat, others have theirs."""
    if trial is None or trial.status != Trial.PAUSED:
        return True
    active = (Trial.PENDING, Trial.RUNNING)
    num_active = sum(other.status in active for other in tune_controller.get_trials())
    return num_active < tune_controller.search_alg.searcher.max_concurrent


def mutation(rate: Range | tuple[float, ...]) -> Any:
    """What Tune changes a rate by: values in order, or a function that draws from a range.

    The function uses Python's global random generator.
    """
    if isinstance(rate, tuple):
        return sorted(rate)
    if rate.log:
        low, high = math.log(rate.low), math.log(rate.high)
        return lambda: math.exp(random.uniform(low, high))
    return lambda: random.uniform(rate.low, rate.high)


@contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Seed Python's global random generator, which Tune draws from, and restore its state at the end."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
