"""Checkpoints that a worker writes for its trials, beside the pack's own thread."""

import asyncio
import json
import logging
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from higgs_tune.sweep.seats import CHECKPOINT_INFO, CheckpointError, Files, Report, read_files

logger = logging.getLogger(__name__)


class Writer:
    """Writes each checkpoint once, perhaps before its trial asks for it."""

    def __init__(self, put: Callable[[Files], Any]) -> None:
        """`put` stores files and returns a reference by which a trial gets them."""
        self._put = put

    def begin(self, report: Report | None) -> None:
        """Begin to write a report's checkpoint, if it has one and that has not begun."""
        if report is not None and report.snapshot is not None and report.written is None:
            executor = asyncio.get_running_loop().run_in_executor
            report.written = executor(None, lambda: self._put(_files(report)))
            report.written.add_done_callback(_note)

    async def take(self, report: Report) -> Any:
        """A reference to the checkpoint of a report with a snapshot; another call writes it anew.

        Raises:
            CheckpointError: it cannot be written.
        """
        written, report.written = report.written, None
        if written is None or (written.done() and written.exception()):  # there may be space now
            self.begin(report)
            written, report.written = report.written, None
        assert written is not None
        try:
            return await written
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{platform.node()} cannot write a checkpoint to {tempfile.gettempdir()}: {error}. Free "
                "space there, or start Ray there with TMPDIR on another disk; then start again with "
                "--resume."
            ) from error

    async def put(self, files: Files) -> Any:
        """A reference to files that exist already."""
        return await asyncio.to_thread(self._put, files)


def _note(done: asyncio.Future[Any]) -> None:
    """Log a failure, which nothing else shows if the trial never asks or the second try succeeds."""
    if not done.cancelled() and (error := done.exception()):
        logger.warning("a checkpoint could not be written: %s: %s", type(error).__name__, error)


def _files(report: Report) -> Files:
    """The files that a report's snapshot writes, and one with its trial and step."""
    assert report.snapshot is not None
    info = {"trial_id": report.trial_id, "step": report.result["step"]}
    with tempfile.TemporaryDirectory() as folder:
        report.snapshot(Path(folder))
        Path(folder, CHECKPOINT_INFO).write_text(json.dumps(info), encoding="utf-8")
        files = read_files(Path(folder))
    report.num_bytes = sum(map(len, files.values()))
    return files
