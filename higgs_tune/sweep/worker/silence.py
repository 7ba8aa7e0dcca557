"""How long a worker has heard nothing from each trial that it waits for."""

import logging
from collections.abc import Iterable

logger = logging.getLogger(__name__)

SLOWEST_BYTES_A_BEAT = 10_000_000  # of the slowest disk for checkpoints; Tune writes each one twice


class Silence:
    """Counts the driver's heartbeats since each trial was last heard."""

    def __init__(self, patience: int, *, together: bool) -> None:
        """Start with no silence.

        Args:
            patience: heartbeats of silence after which a trial is lost.
            together: whether a sign of life from one trial counts for all, which wait for the slowest.
        """
        self.patience, self._together = patience, together
        self._beats: dict[str, int] = {}
        self._busy: dict[str, int] = {}  # extra heartbeats for a trial that stores a checkpoint
        self._warned = False

    def beat(self, missing: Iterable[str], number: int) -> None:
        """Add `number` heartbeats of silence to the missing trials; all others are not silent."""
        self._beats = {trial_id: self._beats.get(trial_id, 0) + number for trial_id in missing}

    def heard(self, trial_id: str, num_bytes: int = 0) -> None:
        """Restart the count; a trial that stores a checkpoint of `num_bytes` may be silent for longer."""
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
        """Warn that the sweep goes on without some trials, the first time only."""
        if not self._warned:
            self._warned = True
            text = "going on without %s after %d silent heartbeats; the sweep may not be repeatable"
            logger.warning(text, sorted(lost), self.patience)
