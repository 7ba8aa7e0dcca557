"""Figures and samples for TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tensorboardX.writer import FileWriter

from higgs_tune import metrics
from higgs_tune.train.samples import Sample

FLUSH_S = 2  # what is written can be seen after so long


class Board:
    """Event files of a run. What an earlier start wrote from `next_step` on is hidden."""

    def __init__(self, directory: Path, next_step: int) -> None:
        # the name holds the second only: a start right behind another must not overwrite its file
        self._writer = SummaryWriter(
            str(directory),
            purge_step=next_step,
            filename_suffix=f".{next_step}",
            flush_secs=FLUSH_S,
            max_queue=0,  # no limit: behind a thread that has died nobody empties it, and `put` would wait
        )

    def add_settings(self, settings: Mapping[str, Any], figures: Sequence[str]) -> None:
        """Let the HParams page show this run: its settings, and which of its figures are results."""
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(figures))
        for summary in (experiment, session):
            self._files().add_summary(summary)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the finite figures of a line of metrics.

        Raises:
            OSError: what was written earlier did not reach the disk.
        """
        self._files()
        for name, value in line.items():
            if name != metrics.STEP and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, line[metrics.STEP])

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write a table of what was heard."""
        rows = [
            "| target | predicted |",
            "|---|---|",
            *(f"| {s.target} | {s.predicted.replace('|', ' ')} |" for s in samples),
        ]
        self._writer.add_text("samples", "\n".join(rows), step)

    def _files(self) -> FileWriter:
        """Where events go; an OSError if the thread that writes them has died of one."""
        files = self._writer.file_writer
        assert isinstance(files, FileWriter)
        thread = files.event_writer._worker
        assert thread is not None, "closed"
        if not thread.is_alive():
            raise OSError("TensorBoard's events could not be written, see above")
        return files

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
