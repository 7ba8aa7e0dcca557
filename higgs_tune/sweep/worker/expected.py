"""Trials that the driver has named, until they ask for their first result.

The driver names a trial before its process exists. From then on the worker knows from which step of the
pack the trial may train, so that the pack waits for the process only if a free slot is meant for it.
"""

from collections.abc import Collection, Iterable

from higgs_tune.sweep.seats import Seat


class Expected:
    """The trials that are still to come, and the pack's step from which each may train."""

    def __init__(self) -> None:
        self.absent: set[str] = set()  # no longer waited for
        self._since: dict[str, int] = {}

    def name(self, trial_ids: Iterable[str], since: int) -> None:
        """Let trials train from this step of the pack, unless they have a step already."""
        for trial_id in trial_ids:
            self._since.setdefault(trial_id, since)

    def keep(self, live: Collection[str]) -> None:
        """Forget all trials but these."""
        self._since = {t: since for t, since in self._since.items() if t in live}

    def place(self, seats: Iterable[Seat]) -> None:
        """Hand their step to the seats whose trials have asked for a result, or need no process yet."""
        for seat in seats:
            if (seat.asks or seat.is_early) and seat.since is None and seat.trial_id in self._since:
                seat.since = self._since.pop(seat.trial_id)

    def give_up(self, trial_ids: Iterable[str]) -> None:
        """Stop waiting for these trials; they may still come."""
        self.absent.update(trial_ids)

    def steps(self) -> dict[str, int]:
        """The trials that are still waited for, with their steps."""
        return {t: since for t, since in self._since.items() if t not in self.absent}

    def by(self, clock: int) -> dict[str, int]:
        """Those of `steps` that may train at this step of the pack."""
        return {t: since for t, since in self.steps().items() if since <= clock}
