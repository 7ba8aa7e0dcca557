"""The slots of a pack: who is in them, who leaves, and who sits down next."""

from higgs_tune.sweep.seats import Seat
from higgs_tune.sweep.worker.expected import Expected


class Line:
    """Knows from which step each may leave or sit down; `Table` decides that."""

    def __init__(self, num_slots: int) -> None:
        self.seats: dict[str, Seat] = {}
        self.residents: dict[str, Seat] = {}  # in the pack; perhaps no longer in `seats`
        self.clock = 0  # optimizer steps of the pack
        self.expected = Expected()
        self.num_slots = num_slots
        self.num_departures = 0  # from the pack
        self.leaving: list[tuple[Seat, int | None]] = []  # from which step; None: not known yet

    def vacate(self, seat: Seat) -> None:
        """A resident's slot is free, and its memory."""
        del self.residents[seat.trial_id]
        self.num_departures += 1

    def num_free(self) -> int:
        """Slots to which somebody could sit down at this step."""
        return self.num_slots - len(self.residents) + len(self.due_to_leave())

    def lacks_memory(self, seat: Seat) -> bool:
        """Whether it finds no room beside those who are there now."""
        return seat.refused_after == self.num_departures and not seat.ended

    def waiting(self) -> list[tuple[int, str]]:
        """From which step, and who, has no slot and may have one; the next one first."""
        able = [s for s in self.seats.values() if not s.ended]
        if not self.due_to_leave():  # else there may be memory in a moment
            able = [seat for seat in able if not self.lacks_memory(seat)]
        seats = [seat for seat in able if self.residents.get(seat.trial_id) is not seat]
        return sorted((s.since, s.trial_id) for s in seats if s.since is not None)

    def due_to_leave(self) -> list[Seat]:
        """Stopped trials that are to go now, and have not ended meanwhile."""
        due = [seat for seat, since in self.leaving if since is not None and since <= self.clock]
        return [seat for seat in due if self.residents.get(seat.trial_id) is seat]

    def ready(self) -> list[tuple[int, str]]:
        """Those of them who may sit down at this step."""
        return [each for each in self.waiting() if each[0] <= self.clock]

    def due_to_join(self) -> list[Seat]:
        """Those of them for whom there is a slot."""
        ready = [self.seats[who] for _, who in self.ready() if who not in self.residents]
        return ready[: self.num_slots - len(self.residents)]

    def is_awaited(self) -> bool:
        """Whether a slot that is free now waits for a trial that is to come."""
        awaited = self.expected.by(self.clock)
        return any(trial_id in awaited for _, trial_id in self.queue()[: self.num_free()])

    def queue(self) -> list[tuple[int, str]]:
        """Since when, and who: may sit down at this step, or will once it has come; the next one first."""
        awaited = [(since, trial_id) for trial_id, since in self.expected.by(self.clock).items()]
        return sorted([*self.ready(), *awaited])
