"""The display of a running sweep: a table in a terminal, JSON lines anywhere else."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from higgs_tune.data.progress import duration
from higgs_tune.files import json_line
from higgs_tune.metrics import VAL_AUDIO_GAIN, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.sweep.board import Board, Row, text_nll

REFRESH_S = 0.5
NUM_OTHER_LINES = 4  # besides trials: header, base, number of hidden trials, state of the sweep
SHRINKABLE = ("cross-attention", "targets")  # cut if the terminal is too narrow
SHOWN = (VAL_TEXT_NLL, VAL_AUDIO_NLL, VAL_AUDIO_GAIN)
STYLES = {
    "running": "cyan",
    "waiting": "dim",
    "paused": "blue",
    "completed": "green",
    "pruned": "dim",
    "cancelled": "yellow",
}


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
        """Print a JSON line, unless a terminal shows the table instead."""
        if self._live is None:
            line = {"event": kind, "time": round(time.time(), 3), **what}
            print(json_line(line), file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line above a terminal's table, e.g. the dashboard's address."""
        if self._live is not None:
            self._live.console.print(Text(text))  # a string's brackets would be markup

    def warn(self, text: str) -> None:
        """Print something that the user should know, in a terminal or as an event."""
        self.event("warning", message=text)
        self.note(text)

    def ending(self, reason: str) -> None:
        """Show that the sweep is ending early."""
        self.board.is_ending = True
        self.event("ending", reason=reason)
        self.note(f"{reason}: trials stop; what they have reported is kept")
        self.refresh(force=True)

    def refresh(self, *, force: bool = False) -> None:
        """Redraw the table, at most twice a second unless forced."""
        if self._live is None or (not force and time.monotonic() - self._refreshed < REFRESH_S):
            return
        self._refreshed = time.monotonic()
        self._live.update(
            render(self.board, self._live.console.height - NUM_OTHER_LINES), refresh=True
        )

    def close(self) -> None:
        """Leave the final table, with all trials, on the screen."""
        if self._live is not None:
            self._live.update(render(self.board, len(self.board.rows)))
            self._live.stop()
            self._live = None


def render(board: Board, num_rows: int) -> Group:
    """The table, with at most `num_rows` trials, and the lines below it."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in ("trial", "state", "rank", "rate", *SHRINKABLE, "step", "text", "audio", "gain"):
        left = name in ("trial", "state", *SHRINKABLE)
        table.add_column(name, justify="left" if left else "right", no_wrap=name not in SHRINKABLE)
    if board.base:
        table.add_row("base", *[""] * 6, *_numbers(board.base), style="dim")
    rows = _rows_to_show(board, num_rows)
    best = board.best()
    for row in rows:
        trial = row.record.config
        table.add_row(
            row.record.trial_id,
            Text(row.state, style=STYLES.get(row.state, "red")),
            str(trial.rank),
            f"{trial.learning_rate:.1e}",
            *(
                Text(name, no_wrap=True, overflow="ellipsis")
                for name in (trial.cross_attention, trial.target_set)
            ),
            f"{row.step}/{trial.num_steps}",
            *_numbers(row.last),
            style="bold" if row is best else None,
        )
    below = [Text(_state(board), style="bold", no_wrap=True)]
    if num_hidden := len(board.rows) - len(rows):
        below.insert(0, Text(f"and {num_hidden} more trials", style="dim"))
    return Group(table, *below) if table.row_count else Group(*below)


def _rows_to_show(board: Board, num_rows: int) -> list[Row]:
    """The `num_rows` trials to show: live ones, then the best completed ones; by id, confirm trials last."""

    def order(row: Row) -> tuple[bool, bool, bool, float]:
        return not row.is_live, row.state == "waiting", row.state != "completed", text_nll(row)

    wanted = sorted(board.rows.values(), key=order)[: max(0, num_rows)]
    return sorted(wanted, key=lambda row: (row.record.confirms is not None, row.record.trial_id))


def _state(board: Board) -> str:
    total = len(board.rows) + board.to_come
    parts = ["ending" if board.is_ending else board.stage]
    parts.append(f"{board.num_ended()}/{total} ended")
    if (best := board.best()) is not None:
        parts.append(f"best {best.record.trial_id} {text_nll(best):.3f}")
    parts.append(f"{duration(board.elapsed_s())} so far")
    if (left := board.time_left_s()) is not None:
        parts.append(f"~{duration(left)} left")
    return " · ".join(parts)


def _numbers(metrics: Mapping[str, Any]) -> list[str]:
    values = [metrics.get(name) for name in SHOWN]
    return ["–" if value is None else f"{value:.3f}" for value in values]
