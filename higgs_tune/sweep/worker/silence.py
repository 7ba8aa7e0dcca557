"""How long a worker has heard nothing of a trial that it waits for."""

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

SLOWEST_BYTES_A_BEAT = 10_000_000  # of a disk on which checkpoints are stored, twice by Tune


class Silence:
    """Counts the driver's heartbeats since each trial was heard."""

    def __init__(self, patience: int, *, together: bool) -> None:
        """Hear everybody for the first time.

        Args:
            patience: heartbeats after which a trial is lost.
            together: all wait for the slowest, so a word of one counts for everyone.
        """
        self.patience, self._together = patience, together
        self._beats: dict[str, int] = {}
        self._busy: dict[str, int] = {}  # heartbeats more for what it has to do
        self._warned = False

    def beat(self, missing: Iterable[str], number: int) -> None:
        """So many heartbeats more for these trials; the others are there."""
        self._beats = {trial_id: self._beats.get(trial_id, 0) + number for trial_id in missing}

    def heard(self, trial_id: str, num_bytes: int = 0) -> None:
        """Count anew; it may be silent for longer while it stores a checkpoint of so many bytes."""
        if self._together:
            self._beats.clear()
        self._beats.pop(trial_id, None)
        self._busy.pop(trial_id, None)
        if busy := num_bytes // SLOWEST_BYTES_A_BEAT:
            self._busy[trial_id] = busy

    def lost(self) -> set[str]:
        """Trials that have been silent for too long."""
        return {
            trial_id
            for trial_id, beats in self._beats.items()
            if beats >= self.patience + self._busy.get(trial_id, 0)
        }

    def warn(self, lost: Iterable[str]) -> None:
        """Say once that the sweep goes on without some."""
        if not self._warned:
            self._warned = True
            text = "going on without %s after %d heartbeats; this sweep may not repeat exactly"
            logger.warning(text, sorted(lost), self.patience)
