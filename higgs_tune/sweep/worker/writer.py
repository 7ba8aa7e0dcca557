"""Checkpoints on their way from a worker to its trials, written beside the pack's own thread."""

import asyncio
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs_tune.sweep.seats import CHECKPOINT_INFO, Files, Report, read_files

logger = logging.getLogger(__name__)


class Writer:
    """Writes each checkpoint once, perhaps before anyone asks for it."""

    def __init__(self, put: Callable[[Files], Any]) -> None:
        """`put` brings files to where a trial finds them by what it returns."""
        self._put = put

    def begin(self, report: Report | None) -> None:
        """Begin to write what belongs to a report, if that has not begun and there is something."""
        if report is not None and report.snapshot is not None and report.written is None:
            executor = asyncio.get_running_loop().run_in_executor
            report.written = executor(None, lambda: self._put(_files(report)))
            report.written.add_done_callback(_note)

    async def take(self, report: Report) -> Any:
        """What refers to a report's files, which have a snapshot; the next time they are written anew."""
        written, report.written = report.written, None
        if written is None or (written.done() and written.exception()):  # space may be there now
            self.begin(report)
            written, report.written = report.written, None
        assert written is not None
        return await written

    async def put(self, files: Files) -> Any:
        """What refers to files that are there already."""
        return await asyncio.to_thread(self._put, files)


def _note(done: asyncio.Future[Any]) -> None:
    """Tell of a failure: perhaps nobody asks for what was to be written, or the second try succeeds."""
    if not done.cancelled() and (error := done.exception()):
        logger.warning("a checkpoint could not be written: %s: %s", type(error).__name__, error)


def _files(report: Report) -> Files:
    """What a report's snapshot writes, and a note of whose it is."""
    assert report.snapshot is not None
    info = {"trial_id": report.trial_id, "step": report.result["step"]}
    with tempfile.TemporaryDirectory() as folder:
        report.snapshot(Path(folder))
        Path(folder, CHECKPOINT_INFO).write_text(json.dumps(info), encoding="utf-8")
        files = read_files(Path(folder))
    report.num_bytes = sum(map(len, files.values()))
    return files
