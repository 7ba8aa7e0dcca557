"""Tune's searcher over one persistent Optuna study.

Ray's own OptunaSearch reports a trial that the scheduler stopped as complete, knows no constraints and
leaves a diverged trial RUNNING for ever. This one reports COMPLETE (full budget), PRUNED (stopped early,
with its intermediate values) or FAIL (cancelled), with status, reason and the audio constraint.

A trial whose configuration broke is PRUNED, too, and violates a constraint of its own. If it FAILed, the
sampler would not see it, and would propose the same region, where nothing trains, again and again.

The searcher also keeps the roster, which tells the workers which trials to wait for.
"""

import json
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from higgs_tune.config import RateChange, SweepConfig, TrialConfig
from higgs_tune.metrics import BROKEN, STEP, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.sweep import space
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.source import LiveTrial, TrialSource
from higgs_tune.sweep.storage import database_errors, retried
from higgs_tune.sweep.study import TrialRecord, ending

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
T = TypeVar("T")

MAX_DUPLICATES = 20  # in a row; then the space counts as exhausted, and a duplicate is run


class StudySearcher(TrialSource):
    """Suggests trials and reports them to the study; the first are the user's configurations."""

    def __init__(
        self,
        study: optuna.Study,
        config: SweepConfig,
        *,
        audio_limit: Callable[[], float],
        on_resume: Callable[[str, FrozenTrial], None],
        on_copy: Callable[[TrialRecord, str], None],
        on_study_error: Callable[[Exception], None],
        **source: Any,
    ) -> None:
        super().__init__(**source)
        self._on_study_error = on_study_error
        self._broken = False  # a write failed for good; a further one would corrupt a journal
        self._study = study
        # not used: `_ask` gives the study all parameters of a trial
        study.sampler = optuna.samplers.RandomSampler(seed=0)
        self._config = config
        self._audio_limit = audio_limit
        self._on_resume = on_resume
        self._on_copy = on_copy
        self._queue = studies.unfinished(study)
        self._next_index = max(studies.latest(study), default=-1) + 1

    def num_to_come(self) -> int:
        """How many trials are left: an earlier run's unfinished ones and new ones up to num_trials."""
        return len(self._queue) + max(0, self._config.tune.num_trials - self._next_index)

    def resuming(self, paused: Collection[str]) -> set[str]:
        """As in TrialSource, but a whole population at once when all of it is paused.

        If the workers waited only after the scheduler's decision, the pack would train the baselines
        meanwhile, by as many steps as that happens to take.
        """
        searched = {key for key, live in self.live.items() if live.record.origin == "search"}
        if self._config.tune.scheduler.name == "pbt" and searched == set(paused):
            return searched
        return super().resuming(paused)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's config for Tune; None if none may start now, FINISHED at the end."""
        if self.over():
            return self.nothing()
        if self.is_full():
            return None
        return self._write(self._next, trial_id) or self.nothing()

    def _next(self, trial_id: str) -> dict[str, Any]:
        if self._queue:
            return self._resume(trial_id, self._queue.pop(0))
        index = self._next_index
        self._next_index += 1
        if index < self._config.num_baselines:
            origin = ("baseline", "baseline_fixed")[index]
            trial, config = self._ask_baseline(index)
        else:
            origin = "search"
            trial, config = self._sample(index)
        name = f"t{index:03d}"
        record = TrialRecord(name, index, space.short_name(name, config), origin, None, config)
        self._store(trial, record)
        return self._seat(trial_id, record, trial, None)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an intermediate value to the study."""
        super().on_trial_result(trial_id, result)
        live = self.live.get(trial_id)
        if live is not None:
            live.status = result.get("status")
            self._write(self._report, live, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how the trial ended; there is no result if it was stopped while paused."""
        live = self.live.get(trial_id)
        if live is None:
            return
        status, reason = ending(result or {"status": live.status, **live.last})
        if error:
            status, reason = "cancelled", self.given_up(trial_id)
        self._write(self._report, live, result or {})
        self._write(self._tell, live, status, reason)
        self._unseat(trial_id)

    def cancel_live(self, reason: str) -> None:
        """Record every live trial as cancelled; a resumed sweep continues it."""
        for tune_id in list(self.live):
            self._write(self._tell, self.live[tune_id], "cancelled", reason)
            self._unseat(tune_id)

    def copied(
        self, trial_id: str, donor_id: str, rates: dict[str, float], step: int
    ) -> dict[str, Any]:
        """Record that a trial took over another's weights and continues with changed rates.

        The trial gets a new study entry, without parameters: no single configuration leads to its
        further results, so the sampler must not learn from them. The former entry ends as pruned, with
        the results of its own configuration.

        Args:
            donor_id: the sweep's id of the other trial, not Tune's.

        Returns:
            The trial's new config for Tune.
        """
        live = self.live[trial_id]
        donor = next(other for other in self.live.values() if other.record.trial_id == donor_id)
        source = donor.record.config
        change = RateChange(step=step, copied_from=donor_id, **rates)
        config = source.model_copy(
            update={"seed": live.record.config.seed, "schedule": (*source.schedule, change)}
        )
        name = space.short_name(live.record.trial_id, config)
        live.record = replace(live.record, config=config, name=name)
        self._write(self._copy, live, donor, f"became a copy of {donor_id} at step {step}")
        return self._tune_config(live, "")

    def _copy(self, live: LiveTrial, donor: LiveTrial, reason: str) -> None:
        former, trial = replace(live), self._ask_fixed(None)
        live.trial = trial
        assert donor.trial is not None
        known = self._study.get_trials(deepcopy=False)[donor.trial.number].intermediate_values
        for step, value in sorted(known.items()):
            trial.report(value, step)
        # From here on a resumed sweep uses this entry and completes the copy (`mend_copy`).
        self._store(trial, live.record)
        self._tell(former, "pruned", reason)
        live.reported, live.last = set(known), dict(donor.last)
        self._on_copy(live.record, donor.record.trial_id)

    def _write(
        self, write: Callable[Arguments, T], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> T | None:
        """Write to the study; an error ends the sweep, and the study stays readable.

        A failed proposal is not retried: it may have left half a trial in the study, which a resumed
        sweep fails as it does a killed sweep's trials.
        """
        if self._broken:
            return None
        try:
            return write(*args, **kwargs)
        except (OSError, *database_errors()) as error:
            self._broken = True
            self._on_study_error(error)
            return None

    def _report(self, live: LiveTrial, result: dict[str, Any]) -> None:
        value, step = result.get(VAL_TEXT_NLL), result.get(STEP)
        if value is None or step is None or not math.isfinite(value):
            return
        assert live.trial is not None
        if int(step) not in live.reported:
            live.reported.add(int(step))
            retried(live.trial.report, value, int(step))
        live.last = {STEP: int(step), VAL_TEXT_NLL: value, VAL_AUDIO_NLL: result[VAL_AUDIO_NLL]}

    def _tell(self, live: LiveTrial, status: str, reason: str | None) -> None:
        trial = live.trial
        assert trial is not None
        states = {"completed": TrialState.COMPLETE, "cancelled": TrialState.FAIL}
        state = states.get(status, TrialState.PRUNED)
        value = live.last[VAL_TEXT_NLL] if status == "completed" else None
        retried(trial.set_user_attr, studies.STATUS, status)
        retried(trial.set_user_attr, studies.REASON, reason)
        if status in BROKEN:
            retried(trial.set_constraint, studies.BROKE, 1.0)
        elif state != TrialState.FAIL:
            excess = live.last[VAL_AUDIO_NLL] - self._audio_limit()
            retried(trial.set_constraint, VAL_AUDIO_NLL, excess)
        # skip_if_finished: a first attempt may have succeeded although it raised
        retried(self._study.tell, trial, value, state, skip_if_finished=True)

    def _sample(self, index: int) -> tuple[optuna.Trial, TrialConfig]:
        seed = space.trial_seed(self._config.tune.seed, "trial", index)
        known = [studies.record_of(old) for old in studies.latest(self._study).values()]
        attempts = 0
        while True:
            trial = self._ask()
            config = space.resolve(space.suggest(trial, self._config), self._config, seed)
            twin = next((old for old in known if space.same_but_seed(old.config, config)), None)
            attempts += 1
            if twin is None or attempts > MAX_DUPLICATES:
                return trial, config
            trial.set_user_attr(studies.DUPLICATE_OF, twin.trial_id)
            self._study.tell(trial, state=TrialState.FAIL)

    def _ask_baseline(self, index: int) -> tuple[optuna.Trial, TrialConfig]:
        values = space.baseline_values(self._config, fixed_flag=index == 1)
        seed = space.trial_seed(self._config.tune.seed, "trial", index)
        params = space.searched_part(values, self._config)
        if params is None:
            logger.info("trial %d lies outside the space: the sampler cannot learn from it", index)
        return self._ask_fixed(params), space.resolve(values, self._config, seed)

    def _ask_fixed(self, params: dict[str, Any] | None) -> optuna.Trial:
        """A new study trial with exactly these parameters; with None, one without any."""
        if params is None:
            return self._study.ask()
        self._study.enqueue_trial(params)
        trial = self._study.ask()
        space.suggest(trial, self._config)
        return trial

    def _resume(self, tune_id: str, old: FrozenTrial) -> dict[str, Any]:
        record = studies.record_of(old)
        trial = self._ask_fixed(old.params or None)
        checkpoint = self._checkpoint_of(record.trial_id)
        steps = 0 if checkpoint is None else checkpoint[1]
        known = {s: v for s, v in sorted(old.intermediate_values.items()) if s <= steps}
        for step, value in known.items():
            trial.report(value, step)
        self._store(trial, record)  # from here on the former entry does not count
        self._on_resume(tune_id, self._study.get_trials(deepcopy=False)[trial.number])
        config = self._seat(tune_id, record, trial, checkpoint)
        self.live[tune_id].reported.update(known)
        return config

    def _store(self, trial: optuna.Trial, record: TrialRecord) -> None:
        trial.set_user_attr(studies.RECORD, json.dumps(record.to_dict()))
        trial.set_user_attr(studies.INDEX, record.number)  # last: `latest` looks for it

    def _ask(self) -> optuna.Trial:
        """A new study trial that the sampler proposes from those that have parameters.

        The others, baselines outside the space and copies, would take places among the sampler's best
        trials, and it would learn less from those with parameters.
        """
        known = self._study.get_trials(deepcopy=False)
        # With one fixed seed the sampler would repeat itself after a resume.
        seed = space.trial_seed(self._config.tune.seed, "sampler", len(known))
        sampler = optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # conditional parameters stay in the model
            constant_liar=True,
            n_startup_trials=max(4, min(10, self._config.tune.num_trials // 3)),
        )
        seen = optuna.create_study(sampler=sampler)
        seen.add_trials(t for t in known if t.params and t.state != TrialState.FAIL)
        proposal = seen.ask()
        space.suggest(proposal, self._config)
        return self._ask_fixed(proposal.params)
