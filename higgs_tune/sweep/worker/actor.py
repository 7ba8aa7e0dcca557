"""The Ray actor that holds the base model once and trains the trials in its slots together.

The `Table` decides which trials train and at which step the pack must stop for a change; this actor
carries that out and passes results on. All its methods run on one event loop. This module never imports
torch; building the training loop does. All calls of the training loop run on one thread, except that
checkpoints are written on another.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import ray

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.errors import SweepError, release_frames
from higgs_tune.sweep.seats import (
    Files,
    Lease,
    Loop,
    Result,
    Roster,
    Seat,
    SlotLostError,
    import_loop,
)
from higgs_tune.sweep.worker import pack
from higgs_tune.sweep.worker.answers import Answers
from higgs_tune.sweep.worker.meter import Meter
from higgs_tune.sweep.worker.notices import Notices
from higgs_tune.sweep.worker.occupancy import num_busy, num_unfinished, num_wanted
from higgs_tune.sweep.worker.pack_thread import PackThread
from higgs_tune.sweep.worker.silence import Silence
from higgs_tune.sweep.worker.table import Table
from higgs_tune.sweep.worker.writer import Writer

logger = logging.getLogger(__name__)

CANCELLED = {"status": "cancelled", "reason": "the sweep is ending"}


class Worker:
    """The Ray actor."""

    def __init__(
        self,
        config: SweepConfig,
        *,
        num_slots: int,
        strict: bool,
        device: str,
        loop_path: str,
        grace_beats: int = 120,
        exit_process: Callable[[int], Any] = os._exit,
        put: Callable[[Files], Any] = ray.put,
    ) -> None:
        self._build = lambda: import_loop(loop_path)(config, num_slots=num_slots, device=device)
        self._silence = Silence(grace_beats, together=strict)
        self._exit_process, self._writer = exit_process, Writer(put)
        fraction, interval = config.tune.ahead_fraction, config.train.report_every_steps
        ahead = max(1, round(fraction * interval)) if fraction else 0
        self._table = Table(num_slots, strict=strict, ahead=ahead)
        self._meter = Meter()
        self._thread = PackThread(ends=not config.base.compile)
        self._num_forwards: Callable[[], int] = lambda: 0  # the training loop's, once it is loaded
        self._loading: asyncio.Future[Loop] | None = None
        self._running: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._interrupt = False  # the pack must stop after its current step
        self._closed = False
        self._broken = False  # the process is about to end
        self._answers = Answers()
        self._notices = Notices()
        logging.getLogger("higgs_tune").addHandler(self._notices)
        self._news = asyncio.Event()  # there are notices for the driver
        self._accepted = asyncio.Event()  # the driver has accepted what was loaded, or is ending
        self._trains = asyncio.Event()  # the pack has begun

    async def describe(self) -> dict[str, Any]:
        """Load the base if necessary; returns the content of base.json and this node's address."""
        node = ray.util.get_node_ip_address()
        try:
            loop = await self._loaded()
        except Exception as error:  # re-raised, with the node, as one that Ray can pass on
            release_frames(error)  # the next try needs the memory of the half-loaded base
            raise pack.load_error(error, node) from error
        return pack.description(loop) | {"node": node}

    async def ready(self) -> None:
        """Return once trials may join, because the driver has accepted what was loaded.

        A process that cannot load its base ends, and must take no trial with it.
        """
        await self._accepted.wait()

    async def serve(self) -> list[str]:
        """Train the trials that join from now on; returns new warnings once there are some.

        The driver always has one such call pending, which fails if this process dies.
        """
        loop = asyncio.get_running_loop()
        self._notices.tell(lambda: loop.call_soon_threadsafe(self._news.set))
        self._accepted.set()
        self._dispatch()
        await self._news.wait()
        self._news.clear()
        return self._notices.take()

    async def trains(self) -> None:
        """Return once the pack trains: then trials that must wait for a slot may join, too."""
        await self._trains.wait()

    async def figures(self) -> dict[str, Any]:
        """The worker's entry in workers.json: where its time went so far."""
        return self._meter.figures()

    async def sync(self, roster: Roster, *, beat: bool = False) -> None:
        """Take the driver's roster: which trials are live and how many are still to come.

        Args:
            beat: whether this is the driver's heartbeat of once a second, which times silent trials.
        """
        if self._closed or self._broken:  # all trials are leaving, perhaps after a last checkpoint
            return
        for trial_id in self._table.gone(roster):
            self._evict(trial_id, "the driver no longer runs this trial")
        self._table.seat_new()
        self._silence.beat(self._table.quiet(), int(beat))
        self._give_up_waiting()
        self._dispatch()
        watched = beat and self._accepted.is_set()  # before that, loading may take very long
        if watched and self._thread.beat(self._num_forwards()):
            self._break(SweepError("the pack has hung, see workers.log"))

    async def join(
        self,
        trial_id: str,
        config: TrialConfig,
        files: Files | None,
        roster_version: int,
        attempt: int,
    ) -> Lease:
        """Lease a seat to a trial: a slot, or a place among those that wait for one."""
        if self._broken or not self._accepted.is_set():
            return "away"
        lease = self._table.join(trial_id, config, files, roster_version, attempt)
        if lease != "seated":
            return lease
        self._answers.fail(
            trial_id, SlotLostError(f"{trial_id}: another process took over this trial")
        )
        self._heard(trial_id)
        return lease

    async def restore(self, trial_id: str, files: Files) -> None:
        """Make a trial that has joined start from a checkpoint instead."""
        self._seat(trial_id)
        self._table.restore(trial_id, files)
        self._heard(trial_id)

    async def next_result(self, trial_id: str) -> Result:
        """Wait until the pack has trained the trial to its next report."""
        seat = self._seat(trial_id)
        if self._closed:
            return CANCELLED
        answer = self._answers.ask(trial_id)
        seat.asks = True
        self._heard(trial_id)
        return await answer

    async def save(self, trial_id: str) -> list[Any]:
        """A list with one Ray reference: to the trial's checkpoint as of the result handed out last."""
        seat = self._seat(trial_id)
        self._heard(trial_id)
        report = seat.last
        if report is None or report.snapshot is None:
            if seat.files is None:
                raise SlotLostError(f"{trial_id} has reported nothing yet that could be saved")
            return [await self._writer.put(seat.files)]
        reference = await self._writer.take(report)
        self._silence.heard(trial_id, num_bytes=report.num_bytes)
        # write the next report's while the driver handles this one; no more, to save memory
        self._writer.begin(self._table.coming())
        return [reference]

    async def close(self) -> None:
        """Stop training, and answer all trials that wait for a result with `CANCELLED`."""
        self._closed = True
        self._accepted.set()  # releases the trials that wait in `ready`
        self._answers.give_all(CANCELLED)
        self._dispatch()

    def _seat(self, trial_id: str) -> Seat:
        if trial_id not in self._table.line.seats:
            raise SlotLostError(f"{trial_id} has no slot in this worker")
        return self._table.line.seats[trial_id]

    def _heard(self, trial_id: str) -> None:
        self._silence.heard(trial_id)
        self._dispatch()

    def _evict(self, trial_id: str, why: str) -> None:
        self._table.drop(trial_id)
        self._answers.fail(trial_id, SlotLostError(f"{trial_id}: {why}"))

    def _dispatch(self) -> None:
        """Hand out the reports that are due, and start or interrupt the pack as the table asks."""
        while not self._closed and (report := self._table.next_report()) is not None:
            self._silence.heard(report.trial_id)
            self._answers.give(report.trial_id, report.result)
            self._writer.begin(report)  # its trial will ask for the checkpoint
        self._interrupt = self._closed or self._table.must_interrupt()
        self._wake.set()
        may_run = self._accepted.is_set() and not self._closed
        if self._running is None and may_run and self._table.line.seats:
            self._running = asyncio.get_running_loop().create_task(self._run())

    def _give_up_waiting(self) -> None:
        """Continue without trials that the driver lists but that have been silent for too long."""
        lost = self._silence.lost()
        if not lost or not self._answers:
            return
        self._silence.warn(lost)
        for trial_id in lost & set(self._table.line.seats):
            self._evict(trial_id, "it did not ask for its next result in time")
        self._table.line.expected.give_up(lost)

    async def _loaded(self) -> Loop:
        if self._loading is None or (self._loading.done() and self._loading.exception()):
            self._loading = self._thread.run(self._build)
        return await self._loading

    async def _run(self) -> None:
        """Train the trials at the table until the sweep ends."""
        try:
            loop = await self._loaded()
            self._num_forwards = lambda: loop.num_forwards
            since = time.monotonic()
            while not self._closed:
                self._dispatch()
                wanted, busy = num_wanted(self._table), num_busy(self._table)
                seconds: dict[str, float] = {}
                num_filled = num_ended = 0
                out, joining = self._table.take_changes()
                if out or joining:
                    kind = "join_s"
                    num_filled = await self._change(loop, out, joining)
                    self._trains.set()  # even if all were refused: then others may come
                elif self._table.can_train():
                    kind = "other_s"
                    seconds, num_ended = await self._advance(loop)
                else:
                    if not self._table.line.seats:
                        self._trains.clear()
                    kind = "wait_s" if num_unfinished(self._table) else "idle_s"
                    self._wake.clear()
                    await self._wake.wait()
                spent_s, since = time.monotonic() - since, time.monotonic()
                seconds[kind] = spent_s - sum(seconds.values())
                self._meter.add(seconds, busy=busy, wanted=wanted)
                self._meter.filled(num_filled)
                self._meter.freed(num_ended)
        except Exception as error:  # `_break` logs it, fails every trial and ends the process
            self._break(error)

    async def _change(self, loop: Loop, out: list[Seat], joining: list[Seat]) -> int:
        """Free slots, then fill them; returns how many were filled."""
        self._meter.freed(len(out))
        outcomes = await self._thread.run(lambda: pack.change(loop, out, joining))
        for seat, outcome in zip(joining, outcomes, strict=True):
            if "account" in outcome:
                seat.account = outcome["account"]
                continue
            first = seat.refused_after is None
            if self._table.refused(seat, outcome) and first:
                logger.warning(pack.NO_MEMORY, seat.trial_id, outcome["reason"])
        return sum("account" in outcome for outcome in outcomes)

    async def _advance(self, loop: Loop) -> tuple[dict[str, float], int]:
        """Train until a trial is due or a change takes effect; seconds by kind, number of ended trials."""
        table, stop_at = self._table, self._table.next_stop()

        def stop() -> bool:
            table.line.clock += 1
            return self._interrupt or (stop_at is not None and table.line.clock >= stop_at)

        results, snapshots, seconds = await self._thread.run(lambda: pack.advance(loop, stop))
        return seconds, len(table.reported(results, snapshots))

    def _break(self, error: Exception) -> None:
        """Fail every trial with the error, then end the process: its pack cannot be trusted any more."""
        self._broken = True
        logger.error("the pack failed", exc_info=error)
        for trial_id in list(self._table.line.seats):
            self._table.drop(trial_id)
            self._answers.fail(trial_id, error)
        asyncio.get_running_loop().call_later(1.0, self._exit_process, 1)
