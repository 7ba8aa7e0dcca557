"""HyperBand for trials that come one by one and take turns in fewer slots than a bracket has trials.

Of Tune's own two, HyperBandScheduler halves a bracket as soon as everyone who is there has reached the
rung. HyperBandForBOHB pauses until the bracket is full, but counts only those that have not ended, so
that a bracket whose trials end never fills; cuts only when a result of that bracket comes, so that one
waits until nobody runs any more if its last two came at once, or its last one diverged; and takes a trial
whose process died into another bracket, to be compared there with others' earlier steps.
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
    members: list[Trial] = field(default_factory=list)  # who has not ended and was not cut
    waiting: dict[Trial, float] = field(default_factory=dict)  # at the next rung, by their losses

    @property
    def is_full(self) -> bool:
        """Whether it takes nobody in any more."""
        return self.num_added == self.rungs.size

    @property
    def next_step(self) -> int | None:
        """The step at which its trials are compared next."""
        steps = self.rungs.steps
        return steps[self.num_cuts] if self.num_cuts < len(steps) else None

    def add(self, trial: Trial) -> None:
        """Take a trial in."""
        self.num_added += 1
        self.members.append(trial)

    def remove(self, trial: Trial) -> None:
        """A trial has ended."""
        self.members = [member for member in self.members if member is not trial]
        self.waiting.pop(trial, None)

    def cut(self) -> tuple[list[Trial], list[Trial]]:
        """Those that go on, in their order, and those that do not."""
        ranked = sorted(self.members, key=self.waiting.__getitem__)
        best = ranked[: self.rungs.survivors[self.num_cuts]]
        self.members = [trial for trial in self.members if trial in best]
        self.num_cuts += 1
        self.waiting.clear()
        return self.members, ranked[len(best) :]


class HyperBand(FIFOScheduler):
    """Pauses trials at the rungs of their brackets until a whole bracket is there, then stops the worse.

    A bracket that the search cannot fill any more is cut as it is.
    """

    _supports_buffered_results = False

    def __init__(self, band: tuple[Rungs, ...], metric: str) -> None:
        """`band`: the brackets that are filled one after the other, again and again."""
        super().__init__()
        self._band, self._metric = band, metric
        self._brackets: list[Bracket] = []
        self._bracket_of: dict[Trial, Bracket] = {}
        self.earlier: dict[str, Mapping[int, float]] = {}  # Tune's id → values of a resumed trial

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Take a new trial into the bracket that fills; one that is tried again stays in its own."""
        if trial in self._bracket_of:
            return
        if not self._brackets or self._brackets[-1].is_full:
            rungs = self._band[len(self._brackets) % len(self._band)]
            self._brackets.append(Bracket(rungs))
        self._brackets[-1].add(trial)
        self._bracket_of[trial] = self._brackets[-1]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Continue to the next rung, wait there, or stop."""
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
        """A trial failed; ERROR is its status while Tune sees to it that it is tried again."""
        if trial.status != Trial.ERROR:
            self.on_trial_remove(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial ended by itself."""
        self.on_trial_remove(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial ended: perhaps the others of its bracket waited for it alone."""
        bracket = self._bracket_of[trial]
        bracket.remove(trial)
        self._cut_if_due(tune_controller, bracket)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The next trial of the earliest bracket that may go on, or has not started."""
        # a pause may have come into effect, or the search to its end
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
        """Cut a bracket once everybody is at its rung, and nobody is still on the way into the pause."""
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
