"""Trials that the driver has named, until they ask for their first result.

The driver names a trial before its process is there. From then on it is known from which step of the pack
the trial may train, so that only a free slot which is to be its waits for it.
"""

from collections.abc import Collection, Iterable

from higgs_tune.sweep.seats import Seat


class Expected:
    """Who is to come, and from which step each may train."""

    def __init__(self) -> None:
        self.absent: set[str] = set()  # waited for too long
        self._since: dict[str, int] = {}

    def name(self, trial_ids: Iterable[str], since: int) -> None:
        """They may train from this step; what was said of one before holds."""
        for trial_id in trial_ids:
            self._since.setdefault(trial_id, since)

    def keep(self, live: Collection[str]) -> None:
        """Forget all but these."""
        self._since = {t: since for t, since in self._since.items() if t in live}

    def place(self, seats: Iterable[Seat]) -> None:
        """Whoever asks has come, or need not."""
        for seat in seats:
            if (seat.asks or seat.is_early) and seat.since is None and seat.trial_id in self._since:
                seat.since = self._since.pop(seat.trial_id)

    def give_up(self, trial_ids: Iterable[str]) -> None:
        """Wait no longer for these, until they come."""
        self.absent.update(trial_ids)

    def steps(self) -> dict[str, int]:
        """Those that are still waited for."""
        return {t: since for t, since in self._since.items() if t not in self.absent}

    def by(self, clock: int) -> dict[str, int]:
        """Those of them that may train by this step of the pack."""
        return {t: since for t, since in self.steps().items() if since <= clock}
