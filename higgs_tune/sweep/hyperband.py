"""HyperBand for trials that come one by one and take turns in fewer slots than a bracket has trials.

Neither of Tune's own two fits. HyperBandScheduler halves a bracket as soon as all trials present have
reached the rung. HyperBandForBOHB waits until the bracket is full, but

- it counts only trials that have not ended, so a bracket whose trials end never fills;
- it cuts a bracket only when one of its results comes. If the last two came at once, or the last trial
  diverged, the bracket waits until no trial runs any more;
- it moves a trial whose process died to another bracket, where it is compared with earlier steps of others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from higgs_tune.config_scheduler import Rungs
from higgs_tune.metrics import STEP


@dataclass
class Bracket:
    """Trials that are compared with each other."""

    rungs: Rungs
    num_added: int = 0
    num_cuts: int = 0
    members: list[Trial] = field(default_factory=list)  # neither ended nor cut
    waiting: dict[Trial, float] = field(default_factory=dict)  # at the next rung, with their losses

    @property
    def is_full(self) -> bool:
        """Whether it takes no more trials."""
        return self.num_added == self.rungs.size

    @property
    def next_step(self) -> int | None:
        """The step at which its trials are compared next; None after the last comparison."""
        steps = self.rungs.steps
        return steps[self.num_cuts] if self.num_cuts < len(steps) else None

    def add(self, trial: Trial) -> None:
        """Add a trial."""
        self.num_added += 1
        self.members.append(trial)

    def remove(self, trial: Trial) -> None:
        """Remove a trial that has ended."""
        self.members = [member for member in self.members if member is not trial]
        self.waiting.pop(trial, None)

    def cut(self) -> tuple[list[Trial], list[Trial]]:
        """Cut at the rung; returns the trials that continue, in order of arrival, and the others."""
        ranked = sorted(self.members, key=self.waiting.__getitem__)
        best = ranked[: self.rungs.survivors[self.num_cuts]]
        self.members = [trial for trial in self.members if trial in best]
        self.num_cuts += 1
        self.waiting.clear()
        return self.members, ranked[len(best) :]


class HyperBand(FIFOScheduler):
    """Pauses trials at a rung until their whole bracket has reached it, then stops the worse ones.

    A bracket that the search can no longer fill is cut as it is.
    """

    _supports_buffered_results = False

    def __init__(self, band: tuple[Rungs, ...], metric: str) -> None:
        """`band`: the brackets, filled one after the other and then again from the first."""
        super().__init__()
        self._band, self._metric = band, metric
        self._brackets: list[Bracket] = []
        self._bracket_of: dict[Trial, Bracket] = {}
        self.earlier: dict[str, Mapping[int, float]] = {}  # Tune's id → values of a resumed trial

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Add a new trial to the bracket that is being filled; a retried one stays in its own."""
        if trial in self._bracket_of:
            return
        if not self._brackets or self._brackets[-1].is_full:
            rungs = self._band[len(self._brackets) % len(self._band)]
            self._brackets.append(Bracket(rungs))
        self._brackets[-1].add(trial)
        self._bracket_of[trial] = self._brackets[-1]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide whether a trial continues to the next rung, pauses there or stops."""
        bracket = self._bracket_of[trial]
        rung = bracket.next_step
        if rung is None or result[STEP] < rung:
            return TrialScheduler.CONTINUE
        value = self.earlier.get(trial.trial_id, {}).get(rung, result[self._metric])
        bracket.waiting[trial] = value
        self._cut_if_due(tune_controller, bracket, reporting=trial)
        if trial in bracket.waiting:
            return TrialScheduler.PAUSE
        return TrialScheduler.CONTINUE if trial in bracket.members else TrialScheduler.STOP

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Remove a trial that failed, unless its status is ERROR: then Tune will retry it."""
        if trial.status != Trial.ERROR:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Remove a trial that ended by itself."""
        self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Remove a trial that ended; cuts its bracket if the others waited for it alone."""
        bracket = self._bracket_of[trial]
        bracket.remove(trial)
        self._cut_if_due(tune_controller, bracket)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial that may continue or has not started, of the earliest bracket that has one."""
        # a pause may have taken effect, or the search may be over
        for bracket in self._brackets:
            self._cut_if_due(tune_controller, bracket)
        return next(self._ready(), None)

    def debug_string(self) -> str:
        """The brackets so far."""
        counts = (
            f"{bracket.num_added} of {bracket.rungs.size} trials, {bracket.num_cuts} cuts"
            for bracket in self._brackets
        )
        return f"HyperBand: {'; '.join(counts)}"

    def _ready(self) -> Iterator[Trial]:
        for bracket in self._brackets:
            for trial in bracket.members:
                is_free = trial.status == Trial.PAUSED and trial not in bracket.waiting
                if is_free or trial.status == Trial.PENDING:
                    yield trial

    def _cut_if_due(
        self, tune_controller: Any, bracket: Bracket, reporting: Trial | None = None
    ) -> None:
        """Cut a bracket that can get no more trials once all are at the rung, all but `reporting` paused."""
        others = [trial for trial in bracket.members if trial is not reporting]
        if not bracket.members or len(bracket.waiting) < len(bracket.members):
            return
        source = tune_controller.search_alg.searcher.searcher
        may_grow = not bracket.is_full and not source.over()
        if may_grow or any(trial.status != Trial.PAUSED for trial in others):
            return
        good, bad = bracket.cut()
        for trial in bad:
            if trial is not reporting:
                tune_controller.stop_trial(trial)
        for trial in good:
            if trial is not reporting:
                source.on_unpause(trial.trial_id)
