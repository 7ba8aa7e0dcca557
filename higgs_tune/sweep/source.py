"""The source of Tune's trials: what the search and the confirm stage share."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import optuna
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from higgs_tune.metrics import VAL_TEXT_NLL
from higgs_tune.sweep.given_up import reason_of
from higgs_tune.sweep.seats import SITS_AT, Roster
from higgs_tune.sweep.study import TrialRecord

logger = logging.getLogger(__name__)

FINISHED = cast("dict[str, Any]", Searcher.FINISHED)  # a string: no more trials


@dataclass
class LiveTrial:
    """A trial between its suggestion and its end."""

    record: TrialRecord
    worker: int
    trial: optuna.Trial | None  # None: a trial outside the study (the confirm stage)
    is_new: bool  # it starts at step 0 and has no result yet
    last: dict[str, Any] = field(default_factory=dict)  # metrics of its newest result
    status: str | None = None  # in its newest result
    reported: set[int] = field(default_factory=set)  # a trial retried after a failure repeats steps


class TrialSource(Searcher):
    """What both stages share: the roster, the choice of a worker, the config of a Tune trial."""

    def __init__(
        self,
        *,
        workers: Sequence[str],
        publish: Callable[[Roster, bool], None],
        serving: Callable[[], Sequence[int]],
        rooms: Callable[[], Sequence[int]],
        checkpoint_of: Callable[[str], tuple[Path, int] | None],
        deadline: float | None = None,
    ) -> None:
        super().__init__(metric=VAL_TEXT_NLL, mode="min")
        self._workers = list(workers)
        self._publish = publish
        self._serving, self._rooms = serving, rooms
        self._checkpoint_of = checkpoint_of
        self._deadline = deadline
        self._version = 0
        self._attempt = 0  # counts Tune's loop, so that a trial's later start has the higher number
        self._named: tuple[str, ...] = ()  # ids of the trials in the newest roster
        self._trials: Sequence[Trial] = ()  # Tune's, whose status says which are paused
        self._ready: set[str] = set()  # Tune's ids of trials whose pause is over
        self._stopped = False
        self.live: dict[str, LiveTrial] = {}  # by Tune's trial id

    def num_to_come(self) -> int:
        """How many trials will still be suggested."""
        raise NotImplementedError

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Free the seat."""
        self._unseat(trial_id)

    def cancel_live(self, reason: str) -> None:
        """Drop every live trial; a resumed sweep continues it."""
        for tune_id in list(self.live):
            self._unseat(tune_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Count the trial at the worker where it sits, which need not be the one chosen for it."""
        live = self.live.get(trial_id)
        self._ready.discard(trial_id)
        if live is not None:
            live.worker = result.get(SITS_AT, live.worker)
            live.is_new = False

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """True: `is_full` keeps to the workers' limits, because Tune would count paused trials."""
        return True

    def on_unpause(self, trial_id: str) -> None:
        """Note that a scheduler lets a trial continue: it gets a slot before any new trial does."""
        self._ready.add(trial_id)
        self.publish()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is a new Tuner on the same study."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this only for Tuner.restore, which is never used here."""
        return {}

    def over(self) -> bool:
        """Whether no further trial will be suggested."""
        if self._deadline is not None and time.monotonic() > self._deadline and not self._stopped:
            logger.warning("tune.time_limit_s is over: no further trial starts")
            self._stopped = True
        return self._stopped or self.num_to_come() == 0

    def nothing(self) -> dict[str, Any] | None:
        """What to suggest when no new trial is left: None, then FINISHED once all trials have ended.

        FINISHED makes Tune end idle processes, also those that paused trials will need.
        """
        return None if self.live else FINISHED

    def given_up(self, tune_id: str) -> str:
        """Why Tune gave a trial up."""
        return reason_of(next((t for t in self._trials if t.trial_id == tune_id), None))

    def stop(self) -> None:
        """Suggest no further trial."""
        self._stopped = True
        self.publish()

    def is_full(self) -> bool:
        """Whether every seat is taken, or kept for a trial whose pause is over.

        While a sweep's only worker loads its base, one trial is enough. The processes of others would
        only compete with loading, and the pack begins without them (`seats.Roster.new`).
        """
        resting = self.paused().keys() - self._ready
        loads = len(self._workers) == 1 and not self._serving()
        # At least one: if it gets none and none runs, Tune blocks for minutes, and heartbeats with it.
        return len(self.live) - len(resting) >= max(1, 0 if loads else sum(self._rooms()))

    def paused(self) -> dict[str, Trial]:
        """The trials that Tune has paused, by Tune's ids; they hold no slot."""
        found = (trial for trial in self._trials if trial.status == Trial.PAUSED)
        return {trial.trial_id: trial for trial in found if trial.trial_id in self.live}

    def resuming(self, paused: Collection[str]) -> set[str]:
        """Tune's ids of the paused trials that the workers must wait for."""
        return self._ready.intersection(paused)

    def watch(self, trials: Sequence[Trial]) -> None:
        """Take Tune's trials, and tell the workers at once if one was paused or continues."""
        self._trials = trials
        self._attempt += 1
        for trial in trials:
            if trial.status in (Trial.PENDING, Trial.PAUSED):
                trial.config["attempt"] = self._attempt
                if live := self.live.get(trial.trial_id):
                    trial.config["worker"] = live.worker  # at another it would leave a seat behind
        if self._seated() != self._named:
            self.publish()

    def publish(self, *, beat: bool = False) -> None:
        """Send the workers the roster of live trials.

        Args:
            beat: whether this is the driver's heartbeat, by which the workers measure time.
        """
        paused = self.paused()
        to_come = 0 if self.over() else self.num_to_come()
        to_come += len(self.resuming(paused.keys()))
        if self._seated() != self._named:
            self._version += 1
            self._named = self._seated()
        for trial in paused.values():  # its next lease must be newer than rosters without it
            trial.config["roster_version"] = self._version + 1
        new = {x.record.trial_id: x.record.config for x in self.live.values() if x.is_new}
        roster = Roster(self._version, self._named, to_come, sum(self._rooms()), new)
        self._publish(roster, beat)

    def _seated(self) -> tuple[str, ...]:
        paused = self.paused()
        return tuple(live.record.trial_id for key, live in self.live.items() if key not in paused)

    def _seat(
        self,
        tune_id: str,
        record: TrialRecord,
        trial: optuna.Trial | None,
        checkpoint: tuple[Path, int] | None,
    ) -> dict[str, Any]:
        loads = [0] * len(self._workers)
        paused = self.paused()
        for key, live in self.live.items():
            if key not in paused:
                loads[live.worker] += 1
        worker = self._next_worker(loads)
        self.live[tune_id] = LiveTrial(record, worker, trial, is_new=checkpoint is None)
        self.publish()
        return self._tune_config(self.live[tune_id], str(checkpoint[0]) if checkpoint else "")

    def _next_worker(self, loads: Sequence[int]) -> int:
        """The worker with the fewest trials, among those that serve and have room, if there are any."""
        rooms = self._rooms()
        ready = [worker for worker in self._serving() if loads[worker] < rooms[worker]]
        return min(ready or range(len(loads)), key=lambda worker: loads[worker])

    def _tune_config(self, live: LiveTrial, restore_from: str) -> dict[str, Any]:
        record = live.record
        changes = record.config.schedule
        return {
            "id": record.trial_id,
            "name": record.name,
            "trial": record.config.model_dump(mode="json"),
            "record": record.to_dict(),
            "rates": record.config.rates_at(changes[-1].step if changes else 0),
            "restore_from": restore_from,
            "worker": live.worker,
            "workers": self._workers,
            "roster_version": self._version,
            "attempt": self._attempt,
        }

    def _unseat(self, tune_id: str) -> None:
        self._ready.discard(tune_id)
        if self.live.pop(tune_id, None) is not None:
            self.publish()
