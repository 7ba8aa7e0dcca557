"""The slots of a pack: which trials are in them, which leave, and which join next."""

from higgs_tune.sweep.seats import Seat
from higgs_tune.sweep.worker.expected import Expected


class Line:
    """Knows the pack's step from which each trial may leave or join, as decided by `Table`."""

    def __init__(self, num_slots: int) -> None:
        self.seats: dict[str, Seat] = {}
        self.residents: dict[str, Seat] = {}  # in the pack; perhaps dropped from `seats`
        self.clock = 0  # optimizer steps of the pack
        self.expected = Expected()
        self.num_slots = num_slots
        self.num_departures = 0  # from the pack
        # stopped trials and the step at which each leaves; None: not known yet
        self.leaving: list[tuple[Seat, int | None]] = []

    def vacate(self, seat: Seat) -> None:
        """Remove a resident, whose slot and memory are free now."""
        del self.residents[seat.trial_id]
        self.num_departures += 1

    def num_free(self) -> int:
        """How many slots trials could take at this step."""
        return self.num_slots - len(self.residents) + len(self.due_to_leave())

    def lacks_memory(self, seat: Seat) -> bool:
        """Whether the trial found no memory beside the trials that are in the pack now."""
        return seat.refused_after == self.num_departures and not seat.ended

    def waiting(self) -> list[tuple[int, str]]:
        """The trials that wait for a slot, as (step from which it may train, id), the next one first."""
        able = [s for s in self.seats.values() if not s.ended]
        if not self.due_to_leave():  # else memory is about to be freed
            able = [seat for seat in able if not self.lacks_memory(seat)]
        seats = [seat for seat in able if self.residents.get(seat.trial_id) is not seat]
        return sorted((s.since, s.trial_id) for s in seats if s.since is not None)

    def due_to_leave(self) -> list[Seat]:
        """Stopped trials that must leave now and have not ended meanwhile."""
        due = [seat for seat, since in self.leaving if since is not None and since <= self.clock]
        return [seat for seat in due if self.residents.get(seat.trial_id) is seat]

    def ready(self) -> list[tuple[int, str]]:
        """Those of `waiting` that may train at this step."""
        return [each for each in self.waiting() if each[0] <= self.clock]

    def due_to_join(self) -> list[Seat]:
        """Those of `ready` for which there is a slot."""
        ready = [self.seats[who] for _, who in self.ready() if who not in self.residents]
        return ready[: self.num_slots - len(self.residents)]

    def is_awaited(self) -> bool:
        """Whether a slot that is free now is meant for a trial whose process has not come yet."""
        awaited = self.expected.by(self.clock)
        return any(trial_id in awaited for _, trial_id in self.queue()[: self.num_free()])

    def queue(self) -> list[tuple[int, str]]:
        """The trials of `ready` and the expected ones that may train at this step, the next one first."""
        awaited = [(since, trial_id) for trial_id, since in self.expected.by(self.clock).items()]
        return sorted([*self.ready(), *awaited])
