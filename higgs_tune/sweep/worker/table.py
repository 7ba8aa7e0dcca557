"""Which trials sit in a worker, and at which of the pack's steps each change takes effect.

The pack keeps training while Tune decides about a trial that has reported. Its clock counts its own
optimizer steps. What follows from a report at step s takes effect at step s + `ahead`: a stopped trial
leaves there, and the trial suggested in its place joins there. If a trial ends at step s, a waiting trial
takes its slot at step s. If none waits, what follows from its report takes effect at step s, too. The
trials that will wait for slots come once the pack trains.

With one worker, the table is strict, which makes the sweep repeatable. If the decision is late, the pack
waits at that step. Reports go out one at a time, in a fixed order, each once everything that follows from
the one before is known; for a new trial its name is enough, and its process may come later. Otherwise
the order in which results happen to reach the driver would decide what the sampler and the scheduler have
seen when they choose. With several workers nothing waits: a change takes effect at the pack's next step.
"""

from collections.abc import Iterable, Mapping

from higgs_tune.config import TrialConfig
from higgs_tune.sweep.seats import Files, Lease, Report, Result, Roster, Seat, Snapshot, num_seats
from higgs_tune.sweep.worker.line import Line


class Table:
    """The seats of a worker. Uses no clock but the pack's, no thread and no event loop."""

    def __init__(self, num_slots: int, *, strict: bool, ahead: int) -> None:
        self.line = Line(num_slots)
        self.roster = Roster(-1, (), 0)
        self._num_seats = num_seats(num_slots, strict=strict)
        self._num_batches = 0  # of reports
        # of ended trials, which `_expedite` has yet to consider
        self._unconsidered: list[Report] = []
        self._strict = strict
        self._ahead = ahead if strict else 0
        self._start_step: int | None = None  # until the trials that will wait are named, then None
        self._attempts: dict[str, int] = {}  # the newest attempt with which each trial has joined
        self._undecided: Report | None = None  # handed out; what follows from it is not known yet

    def seat_new(self) -> None:
        """Seat the roster's new trials, even if their processes have not come yet.

        Does nothing with several workers, because any of them may get the trial.
        """
        new, version = self.roster.new, self.roster.version
        for trial_id in self.missing() & new.keys():
            self.line.seats[trial_id] = Seat(trial_id, new[trial_id], None, version, is_early=True)

    def join(
        self,
        trial_id: str,
        config: TrialConfig,
        files: Files | None,
        roster_version: int,
        attempt: int,
    ) -> Lease:
        """Lease a seat, if one is free. Keeps the trial's former seat only if it is as good as new.

        Tune sometimes requests a process for a trial and then gives the trial an idle one instead. The
        requested one may still come, and later than that; its lower `attempt` shows that it is outdated.
        """
        if attempt < self._attempts.get(trial_id, 0):
            return "outdated"
        seat = self.line.seats.get(trial_id)
        if seat is not None and seat.begins_like(config, files):
            seat.asks = False
            self._has_come(trial_id, attempt)
            return "seated"
        others = [s for s in self.line.seats.values() if s.trial_id != trial_id and not s.ended]
        if len(others) >= self._num_seats:
            return "full"
        self.drop(trial_id)
        self.line.seats[trial_id] = Seat(trial_id, config, files, roster_version)
        self._has_come(trial_id, attempt)
        return "seated"

    def _has_come(self, trial_id: str, attempt: int) -> None:
        self._attempts[trial_id] = attempt
        self.line.expected.absent.discard(trial_id)

    def drop(self, trial_id: str) -> None:
        """Forget a trial; what it still trains until it leaves the pack is discarded."""
        seat = self.line.seats.pop(trial_id, None)
        if seat is not None and self.line.residents.get(trial_id) is seat:
            self.line.leaving.append((seat, None))

    def restore(self, trial_id: str, files: Files) -> None:
        """Make a trial start from another checkpoint."""
        seat = self.line.seats[trial_id]
        self.drop(trial_id)
        self.line.seats[trial_id] = Seat(trial_id, seat.config, files, seat.roster_version)

    def gone(self, roster: Roster) -> list[str]:
        """Take the driver's roster; returns the seated trials that it no longer names."""
        self.roster = roster
        self.line.expected.keep(roster.live)
        return [
            seat.trial_id
            for seat in self.line.seats.values()
            if seat.trial_id not in roster.live and seat.roster_version <= roster.version
        ]

    def settled(self) -> bool:
        """Whether everything that follows from the last report is known; if so, sets when it takes effect.

        At the start this is false until all trials that will wait for a slot are named.
        """
        is_decided = not self._strict or self._is_decided()
        if is_decided:
            known = self._undecided.takes_effect if self._undecided else self._start_step
            now = self.line.clock if known is None else known
            more = (
                self.roster.to_come > 0 and self.roster.num_sent(self._num_seats) < self._num_seats
            )
            self._start_step = now if self._strict and more else None
            self._undecided = None
            self.line.expected.name(self._unplaced(), now)
            self.line.leaving = [
                (seat, now if at is None else at) for seat, at in self.line.leaving
            ]
        self.line.expected.place(self.line.seats.values())
        return is_decided and self._start_step is None

    def next_report(self) -> Report | None:
        """Take out the report to hand out now, if there is one; its trial no longer counts as asking.

        None, too, while the pack waits for a trial's process: the driver must start that first, unless
        the pack needs the report's consequences now. A strict worker hands out reports in their order
        and waits for the trial whose turn it is to ask.
        """
        if not self.settled():
            return None
        self._expedite()
        seats = [s for s in self.line.seats.values() if s.reports and (s.asks or self._strict)]
        report = min((seat.reports[0] for seat in seats), key=Report.turn, default=None)
        if report is None or not self.line.seats[report.trial_id].asks:
            return None
        if report.takes_effect > self.line.clock and self.line.is_awaited():
            return None
        seat = self.line.seats[report.trial_id]
        seat.reports.popleft()
        seat.asks = False
        seat.last = report
        self._undecided = report if self._strict else None
        return report

    def coming(self) -> Report | None:
        """The report that goes out next, unless another comes in that has an earlier turn."""
        ready = [seat.reports[0] for seat in self.line.seats.values() if seat.reports]
        return min(ready, key=Report.turn, default=None)

    def take_changes(self) -> tuple[list[Seat], list[Seat]]:
        """Apply this step's changes; returns the seats that leave the pack and those that then join."""
        if not self.line.residents and self._start_step is None:
            self._skip_to_next_change()
        if not self._is_open():
            return [], []
        out = self.line.due_to_leave()
        for seat in out:
            self.line.vacate(seat)
        self.line.leaving = [
            (s, since) for s, since in self.line.leaving if self.line.residents.get(s.trial_id) is s
        ]
        joining = self.line.due_to_join()
        self.line.residents.update((seat.trial_id, seat) for seat in joining)
        return out, joining

    def must_interrupt(self) -> bool:
        """Whether the pack must stop before `next_stop`, because something has changed meanwhile."""
        return not self._is_open() or bool(self.line.due_to_leave() or self.line.due_to_join())

    def can_train(self) -> bool:
        """Whether the pack may do a step now; for the first, all slots must be filled that can be."""
        is_short = self._start_step is not None and len(self.line.residents) < self.line.num_slots
        return bool(self.line.residents) and not is_short and self._is_open()

    def next_stop(self) -> int | None:
        """The step at which the pack must consult the table again; None: not before a trial is due."""
        steps = [*self._changes(), *(since for _, since in self.line.leaving if since is not None)]
        return min((step for step in steps if step > self.line.clock), default=None)

    def reported(
        self, results: Mapping[str, Result], snapshots: Mapping[str, Snapshot]
    ) -> list[str]:
        """Take validated results; returns the trials that have ended and therefore leave the pack."""
        ended = []
        self._num_batches += 1
        for trial_id, result in results.items():
            seat = self.line.residents[trial_id]
            if self.line.seats.get(trial_id) is seat:
                if seat.account is not None:
                    result, seat.account = {**result, "account": seat.account}, None
                snapshot = snapshots.get(trial_id)
                seat.reports.append(self._report(trial_id, result, snapshot))
            if result["status"] != "running":
                seat.ended = True
                self.line.vacate(seat)
                ended.append(trial_id)
        return ended

    def refused(self, seat: Seat, result: Result) -> bool:
        """Handle a seat that could not join the pack; returns whether it waits to try again.

        It waits if it lacks memory and other trials are in the pack, until one of them leaves.
        """
        del self.line.residents[seat.trial_id]
        if result["status"] == "out_of_memory" and self.line.residents:
            seat.refused_after = self.line.num_departures
            return True
        seat.ended = True
        self.line.num_departures += 1
        self._num_batches += 1
        if self.line.seats.get(seat.trial_id) is seat:
            seat.reports.append(self._report(seat.trial_id, result, None))
        return False

    def quiet(self) -> set[str]:
        """Trials that the worker waits to hear from: they have no seat or do not ask for a result."""
        idle = {seat.trial_id for seat in self.line.seats.values() if not seat.asks}
        return idle | self.missing()

    def missing(self) -> set[str]:
        """Live trials that have no seat yet; none with several workers: they may sit elsewhere."""
        live = set(self.roster.live) if self._strict else set()
        return live - self.line.seats.keys() - self.line.expected.absent

    def _is_decided(self) -> bool:
        """Whether the driver owes the worker no decision.

        It can send no further trial for now, and each trial that got a result has asked for the next one
        or is gone. A new trial's process need not have come, because the driver names the trial before.
        """
        live = self.roster.live
        full = len(live) >= self.roster.num_sent(self._num_seats) or self.roster.to_come == 0
        deciding = any(s.last and not s.asks for s in self.line.seats.values())
        return full and self.line.seats.keys() <= set(live) and not deciding

    def _unplaced(self) -> list[str]:
        """Trials that need to be given the step from which they may train."""
        if not self._strict:  # others may sit elsewhere
            return [t for t, seat in self.line.seats.items() if seat.asks and seat.since is None]
        named = {trial_id: self.line.seats.get(trial_id) for trial_id in self.roster.live}
        return [trial_id for trial_id, seat in named.items() if seat is None or seat.since is None]

    def _is_open(self) -> bool:
        """Whether everything is known that takes effect by this step."""
        if not self._strict:
            return True
        if self._start_step is not None:  # nothing changes before the first report
            is_full = len(self.line.residents) == self.line.num_slots
            everyone = self._is_decided() and not self.line.expected.steps()
            return (is_full or everyone) and not any(self._outstanding())
        self._expedite()  # before the pack does anything more
        if self._is_owed() or self.line.is_awaited():
            return False
        return self._undecided is not None or self._is_decided()

    def _outstanding(self) -> Iterable[Report]:
        """Reports whose consequences are not known yet; none with several workers."""
        if self._strict:
            if self._undecided is not None:
                yield self._undecided
            for seat in self.line.seats.values():
                yield from seat.reports

    def _is_owed(self) -> bool:
        """Whether something that takes effect by this step is not known yet."""
        return any(report.takes_effect <= self.line.clock for report in self._outstanding())

    def _expedite(self) -> None:
        """Let successors of trials that have just ended join at this step in slots for which no trial waits.

        The pack stands still until the successors are known. Each report is considered once, when the
        slots of its step are known: later, timing would decide whether it is still there.
        """
        if self._is_owed() or not self._unconsidered:
            return
        num_lacking = max(0, self.line.num_free() - len(self.line.queue()))
        for report in sorted(self._unconsidered, key=Report.turn)[:num_lacking]:
            report.takes_effect = self.line.clock
        self._unconsidered.clear()

    def _report(self, trial_id: str, result: Result, snapshot: Snapshot | None) -> Report:
        takes_effect = self.line.clock + self._ahead
        report = Report(self._num_batches, trial_id, result, snapshot, takes_effect)
        if result["status"] != "running":
            self._unconsidered.append(report)
        return report

    def _skip_to_next_change(self) -> None:
        """While no trial trains, move the clock to the next step at which one may."""
        self.line.clock = max(self.line.clock, min(self._changes(), default=0))

    def _changes(self) -> list[int]:
        """The steps at which a report takes effect or a trial may join."""
        waiting = [since for since, _ in self.line.waiting()]
        reports = [report.takes_effect for report in self._outstanding()]
        return [*reports, *waiting, *self.line.expected.steps().values()]
