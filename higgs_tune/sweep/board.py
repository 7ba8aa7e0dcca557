"""The state of a sweep as displayed, and an estimate of the time left."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from higgs_tune.metrics import STEP, VAL_TEXT_NLL
from higgs_tune.sweep.study import TrialRecord

LIVE = ("running", "waiting", "paused")


@dataclass
class Row:
    """One trial."""

    record: TrialRecord
    state: str
    last: dict[str, Any]
    reports: bool = False  # has reported since its last start
    is_feasible: bool | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.last.get(STEP, 0))

    @property
    def is_live(self) -> bool:
        """Whether it has not ended."""
        return self.state in LIVE


class Board:
    """The trials' states, kept up to date by the sweep's events; `rows` are in order of last start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows: dict[str, Row] = {}
        self.base: Mapping[str, Any] = {}  # metrics of the untouched base
        self.stage = "starting"
        self.num_slots = 0  # of all workers
        self.to_come = 0  # trials of this stage that have not started
        self.steps_after = 0  # optimizer steps of the stage after this one
        self.is_ending = False  # before all trials have run
        self._clock = clock
        self._began = clock()
        self._since: float | None = None
        self._steps_done = 0

    def begin(self) -> None:
        """Note that a worker begins to train; the pace is measured from the first call on."""
        if self._since is None:
            self._since = self._clock()

    def expect(self, num_to_come: int, num_live: int) -> None:
        """Set the number of trials to come: to be suggested, or live without a process yet."""
        num_started = sum(row.is_live for row in self.rows.values())
        self.to_come = num_to_come + max(0, num_live - num_started)

    def start(self, record: TrialRecord, step: int, known: Mapping[str, Any]) -> None:
        """Note that a trial starts, or continues at `step` with its last known metrics."""
        self.rows.pop(record.trial_id, None)
        self.rows[record.trial_id] = Row(record, "waiting", {**known, STEP: step})
        self._seat()

    def known(
        self, record: TrialRecord, status: str, last: Mapping[str, Any], is_feasible: bool | None
    ) -> None:
        """Add a trial that ended in an earlier run of the sweep."""
        self.rows[record.trial_id] = Row(record, status, dict(last), is_feasible=is_feasible)

    def result(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Note a trial's new metrics."""
        row = self.rows[trial_id]
        self._steps_done += max(0, int(metrics.get(STEP, 0)) - row.step)
        row.last, row.reports = {**row.last, **metrics}, True
        self._seat()

    def pause(self, trial_ids: Collection[str]) -> None:
        """Mark these live trials as paused, and no others."""
        for trial_id, row in self.rows.items():
            if row.is_live:
                row.state = "paused" if trial_id in trial_ids else "waiting"
        self._seat()

    def end(self, trial_id: str, status: str, is_feasible: bool | None = None) -> None:
        """Note how a trial ended."""
        if trial_id in self.rows:
            self.rows[trial_id].state = status
            self.rows[trial_id].is_feasible = is_feasible
            self._seat()

    def _seat(self) -> None:
        """Mark which trials have a slot and which wait: they get slots in the order of their starts.

        New trials get them in the order of their numbers, whichever process comes first.
        """
        rows = [row for row in self.rows.values() if row.is_live and row.state != "paused"]
        new = iter(sorted((r for r in rows if not r.step), key=lambda row: row.record.number))
        rows = [row if row.step else next(new) for row in rows]
        for place, row in enumerate(sorted(rows, key=lambda row: not row.reports)):
            row.state = "running" if row.reports or place < self.num_slots else "waiting"

    def num_ended(self) -> int:
        """How many trials have ended, not counting cancelled ones."""
        return sum(not row.is_live and row.state != "cancelled" for row in self.rows.values())

    def best(self) -> Row | None:
        """The search's completed trial with the lowest text loss within the audio limit, or None."""
        rows = [
            row
            for row in self.rows.values()
            if row.state == "completed" and row.is_feasible and row.record.confirms is None
        ]
        return min(rows, key=text_nll, default=None)

    def elapsed_s(self) -> float:
        """Seconds since the command began."""
        return self._clock() - self._began

    def time_left_s(self) -> float | None:
        """An estimate from the pace so far, next stage included; None before a result or while ending."""
        if self._since is None or self._steps_done == 0 or self.is_ending:
            return None
        running = [row for row in self.rows.values() if row.is_live]
        ended = [row.step for row in self.rows.values() if row.state in ("completed", "pruned")]
        budgets = [row.record.config.num_steps for row in self.rows.values()]
        usual = sum(ended) / len(ended) if ended else max(budgets, default=0)
        steps_left = sum(row.record.config.num_steps - row.step for row in running)
        steps_left += self.to_come * usual + self.steps_after
        return steps_left * (self._clock() - self._since) / self._steps_done


def text_nll(row: Row) -> float:
    """The text loss that the trial reported last; infinite if none."""
    value = row.last.get(VAL_TEXT_NLL)
    return float("inf") if value is None else value
