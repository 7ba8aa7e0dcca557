"""TensorBoard logs of a sweep: a run for each trial, with its settings and metrics."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgs_tune.files import read_json_lines
from higgs_tune.metrics import VAL_AUDIO_GAIN, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.sweep.later import Later
from higgs_tune.sweep.study import TrialRecord

if TYPE_CHECKING:
    from higgs_tune.train.board import Board

BOARDS = "tensorboard"


class Boards:
    """Writes `tensorboard/<id>` from `trials/<id>/metrics.jsonl`, on a thread; only `finish` waits for it."""

    def __init__(self, results: Path, searched: Iterable[str]) -> None:
        self._results, self._later = results, Later()
        self._searched = list(searched)  # names of settings
        self._open: dict[str, tuple[Board, list[dict[str, Any]]]] = {}  # and the lines written

    def update(self, record: TrialRecord) -> None:
        """Queue the writing of the metrics that a trial has added or changed."""
        self._later.queue(lambda: self._follow(record))

    def end(self, trial_id: str) -> None:
        """Queue the closing of a trial's run, because it has ended, at least for now."""
        self._later.queue(lambda: self._close(trial_id))

    def check(self) -> None:
        """Raise the first error since the last call."""
        self._later.check()

    def finish(self) -> None:
        """Wait for everything, and raise its first error."""
        self._later.finish()

    def _follow(self, record: TrialRecord) -> None:
        # Not at the top: it imports torch, for which nothing should wait before the first result.
        from higgs_tune.train.board import Board

        trial_id, config = record.trial_id, record.config.model_dump()
        lines = read_json_lines(self._results / "trials" / trial_id / "metrics.jsonl")
        board, known = self._open.get(trial_id, (None, []))
        # Replace what an earlier start or, in a population, another configuration wrote.
        if board is None or lines[: len(known)] != known:
            self._close(trial_id)
            folder = self._results / BOARDS / trial_id
            shutil.rmtree(folder, ignore_errors=True)
            board, known = Board(folder, next_step=0), []
            board.add_settings(
                {name: config[name] for name in self._searched},
                (VAL_TEXT_NLL, VAL_AUDIO_GAIN, VAL_AUDIO_NLL),
            )
        for line in lines[len(known) :]:
            board.add(line)
        self._open[trial_id] = board, lines

    def _close(self, trial_id: str) -> None:
        board, _ = self._open.pop(trial_id, (None, []))
        if board is not None:
            board.close()
