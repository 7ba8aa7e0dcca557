"""Writes metrics and samples for TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tensorboardX.writer import FileWriter

from higgs_tune import metrics
from higgs_tune.train.samples import Sample

FLUSH_S = 2  # seconds until written events become visible


class Board:
    """A run's event files; hides what an earlier start wrote from `next_step` on."""

    def __init__(self, directory: Path, next_step: int) -> None:
        # file names resolve whole seconds: without the suffix, a quick restart would overwrite a file
        self._writer = SummaryWriter(
            str(directory),
            purge_step=next_step,
            filename_suffix=f".{next_step}",
            flush_secs=FLUSH_S,
            max_queue=0,  # no limit: if the writer thread has died, `put` on a full queue blocks
        )

    def add_settings(self, settings: Mapping[str, Any], figures: Sequence[str]) -> None:
        """Show this run on the HParams page: its settings, and which `figures` are results."""
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(figures))
        for summary in (experiment, session):
            self._files().add_summary(summary)

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the finite values of a line of metrics.

        Raises:
            OSError: an earlier write did not reach the disk.
        """
        self._files()
        for name, value in line.items():
            if name != metrics.STEP and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, line[metrics.STEP])

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write a table of target and predicted texts."""
        rows = [
            "| target | predicted |",
            "|---|---|",
            *(f"| {_cell(s.target)} | {_cell(s.predicted)} |" for s in samples),
        ]
        self._writer.add_text("samples", "\n".join(rows), step)

    def _files(self) -> FileWriter:
        """The event writer; raises OSError if its thread has died."""
        files = self._writer.file_writer
        assert isinstance(files, FileWriter)
        thread = files.event_writer._worker
        assert thread is not None, "closed"
        if not thread.is_alive():
            raise OSError("TensorBoard's events could not be written, see above")
        return files

    def close(self) -> None:
        """Write out what is still queued."""
        self._writer.close()


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
