"""What a person sees of a running sweep: a table in a terminal, JSON lines anywhere else."""

import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from higgs_tune.data.progress import duration
from higgs_tune.files import json_line
from higgs_tune.metrics import STEP, VAL_AUDIO_GAIN, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.sweep.study import TrialRecord

REFRESH_S = 0.5
LIVE = ("running", "paused")
SHOWN = (VAL_TEXT_NLL, VAL_AUDIO_NLL, VAL_AUDIO_GAIN)
STYLES = {
    "running": "cyan",
    "paused": "blue",
    "completed": "green",
    "pruned": "dim",
    "cancelled": "yellow",
}


@dataclass
class Row:
    """One trial of the table."""

    record: TrialRecord
    state: str
    last: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.last.get(STEP, 0))


class Board:
    """The state of the sweep as it is shown, and the estimate of what is left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.rows: dict[str, Row] = {}
        self.stage = "starting"
        self.to_come = 0
        self._clock = clock
        self._since: float | None = None
        self._steps_done = 0

    def start(self, record: TrialRecord, step: int) -> None:
        """A trial starts or goes on at `step`."""
        if self._since is None:
            self._since = self._clock()
        self.rows[record.trial_id] = Row(record, "running", {STEP: step} if step else {})

    def result(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """A trial reported."""
        row = self.rows[trial_id]
        self._steps_done += max(0, int(metrics.get(STEP, 0)) - row.step)
        row.last = {**row.last, **metrics}

    def pause(self, trial_ids: Collection[str]) -> None:
        """These trials wait for others, and no other one does."""
        for trial_id, row in self.rows.items():
            if row.state in LIVE:
                row.state = "paused" if trial_id in trial_ids else "running"

    def end(self, trial_id: str, status: str) -> None:
        """A trial ended."""
        if trial_id in self.rows:
            self.rows[trial_id].state = status

    def time_left_s(self) -> float | None:
        """An estimate from the pace so far; None before the first result."""
        if self._since is None or self._steps_done == 0:
            return None
        running = [row for row in self.rows.values() if row.state in LIVE]
        ended = [row.step for row in self.rows.values() if row.state in ("completed", "pruned")]
        budgets = [row.record.config.num_steps for row in self.rows.values()]
        usual = sum(ended) / len(ended) if ended else max(budgets, default=0)
        steps_left = sum(row.record.config.num_steps - row.step for row in running)
        steps_left += self.to_come * usual
        return steps_left * (self._clock() - self._since) / self._steps_done


class Display:
    """Shows a board; `event` is called for everything that happens."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.board = Board()
        self._stream: TextIO = stream or sys.stdout
        self._live: Live | None = None
        self._refreshed = 0.0
        if self._stream.isatty():
            self._live = Live(
                console=Console(file=self._stream), auto_refresh=False, transient=False
            )
            self._live.start()

    def event(self, kind: str, **what: Any) -> None:
        """One JSON line; a terminal shows the table instead."""
        if self._live is None:
            line = {"event": kind, "time": round(time.time(), 3), **what}
            print(json_line(line), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line above the table, e.g. the dashboard's address."""
        if self._live is not None:
            self._live.console.print(text)

    def warn(self, text: str) -> None:
        """Something that a person should know of."""
        self.event("warning", message=text)
        self.note(text)

    def refresh(self, *, force: bool = False) -> None:
        """Draw the table anew, at most twice a second."""
        if self._live is None or (not force and time.monotonic() - self._refreshed < REFRESH_S):
            return
        self._refreshed = time.monotonic()
        self._live.update(render(self.board), refresh=True)

    def close(self) -> None:
        """Leave the last table on the screen."""
        self.refresh(force=True)
        if self._live is not None:
            self._live.stop()
            self._live = None


def render(board: Board) -> Group:
    """The table and the line below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial")
    table.add_column("state")
    for name in ("rank", "rate"):
        table.add_column(name, justify="right")
    table.add_column("flag")
    table.add_column("targets")
    for name in ("step", "text nll", "audio nll", "audio gain"):
        table.add_column(name, justify="right")
    for trial_id, row in sorted(board.rows.items(), key=_search_first):
        trial = row.record.config
        table.add_row(
            trial_id,
            Text(row.state, style=STYLES.get(row.state, "red")),
            str(trial.rank),
            f"{trial.learning_rate:.1e}",
            trial.cross_attention,
            trial.target_set,
            f"{row.step}/{trial.num_steps}",
            *(_number(row.last.get(name)) for name in SHOWN),
        )
    left = board.time_left_s()
    ended = sum(row.state not in LIVE for row in board.rows.values())
    total = len(board.rows) + board.to_come
    line = f"{board.stage} · {ended}/{total} trials ended"
    if left is not None:
        line += f" · about {duration(left)} left"
    return Group(table, Text(line, style="bold"))


def _search_first(item: tuple[str, Row]) -> tuple[bool, str]:
    return item[0].startswith("c"), item[0]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
