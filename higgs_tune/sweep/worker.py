"""One process that holds the base model once and trains the trials of its slots together.

A round: every seated trial waits for its next result, the pack trains one interval, the results
go out. In a sweep with one worker the rounds are strict, which makes a sweep repeatable: a round
starts only when everyone on the driver's roster sits and waits and no further trial could join;
results go out in the order of the trial ids, and the next one only when the former was dealt with,
i.e. the table is settled again. Otherwise two results that race to the driver would decide what
the sampler and the scheduler have seen when they choose.

Torch is imported where the loop is built, never by this module, and every call of the loop runs on
one thread.
"""

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.sweep.seats import (
    CHECKPOINT_INFO,
    DEFAULT_LOOP,
    Files,
    Loop,
    Result,
    Roster,
    Seat,
    SlotLostError,
    import_loop,
    read_files,
    write_files,
)

logger = logging.getLogger(__name__)


class Worker:
    """The Ray actor. All methods run on one event loop; the pack runs on one thread beside it."""

    def __init__(
        self,
        config: SweepConfig,
        *,
        num_slots: int,
        strict: bool,
        device: str,
        loop_path: str = DEFAULT_LOOP,
        grace_beats: int = 120,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._config = config
        self._num_slots = num_slots
        self._strict = strict
        self._device = device
        self._loop_path = loop_path
        self._grace_beats = grace_beats
        self._exit_process = exit_process
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pack")
        self._loading: asyncio.Future[Loop] | None = None
        self._loop: Loop | None = None
        self._seats: dict[str, Seat] = {}
        self._roster = Roster(-1, (), 0)
        self._busy = False
        self._closed = False
        self._beats = 0  # heartbeats of the driver since something last moved
        self._absent: set[str] = set()  # on the roster, but waited for too long
        self._warned = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def describe(self) -> dict[str, Any]:
        """Load the base if that has not happened; what base.json says of it and the data."""
        loop = await self._loaded()
        return {
            "metrics": dict(loop.base_metrics),
            "preflight": dict(loop.preflight),
            "content_hash": loop.content_hash,
        }

    async def sync(self, roster: Roster) -> None:
        """The driver's heartbeat: who is live, how many are to come."""
        if self._closed:  # everyone leaves by itself, perhaps with a last checkpoint
            return
        self._roster = roster
        for seat in list(self._seats.values()):
            if seat.trial_id not in roster.live and seat.roster_version <= roster.version:
                self._evict(seat, "the driver no longer runs this trial")
        self._beats += 1
        self._turn()

    async def join(
        self, trial_id: str, config: TrialConfig, files: Files | None, roster_version: int
    ) -> bool:
        """Lease a slot, which the pack fills before its next round; False when all are taken."""
        if trial_id in self._seats:  # its former trainable died; the new one takes over
            self._evict(self._seats[trial_id], "another process took over this trial")
        elif len(self._seats) >= self._num_slots:
            return False
        self._seats[trial_id] = Seat(trial_id, config, files, roster_version)
        self._absent.discard(trial_id)
        self._moved()
        return True

    async def restore(self, trial_id: str, files: Files) -> None:
        """Start a trial that has joined from a checkpoint instead."""
        seat = self._seat(trial_id)
        if seat.resident:
            self._unseat(seat)
        seat.files, seat.result = files, None
        self._moved()

    async def next_result(self, trial_id: str) -> Result:
        """Wait until the pack has trained the trial's next interval."""
        seat = self._seat(trial_id)
        if self._closed:
            return {"status": "cancelled", "reason": "the sweep is ending"}
        seat.waiting = asyncio.get_running_loop().create_future()
        self._moved()
        return await seat.waiting

    async def save(self, trial_id: str) -> Files:
        """The trial's adapter and training state, as of the result handed out last."""
        seat = self._seat(trial_id)
        loop = await self._loaded()

        def save() -> Files:
            with tempfile.TemporaryDirectory() as folder:
                loop.save(trial_id, Path(folder))
                return read_files(Path(folder))

        files = await asyncio.get_running_loop().run_in_executor(self._thread, save)
        info = {"trial_id": trial_id, "step": seat.step}
        return {**files, CHECKPOINT_INFO: json.dumps(info).encode()}

    async def close(self) -> None:
        """Let everyone who waits go; no further round starts."""
        self._closed = True
        for seat in self._seats.values():
            self._hand_out(seat, {"status": "cancelled", "reason": "the sweep is ending"})

    def _seat(self, trial_id: str) -> Seat:
        if trial_id not in self._seats:
            raise SlotLostError(f"{trial_id} has no slot in this worker")
        return self._seats[trial_id]

    def _moved(self) -> None:
        self._beats = 0
        self._turn()

    def _evict(self, seat: Seat, why: str) -> None:
        del self._seats[seat.trial_id]
        if seat.waiting is not None and not seat.waiting.done():
            seat.waiting.set_exception(SlotLostError(f"{seat.trial_id}: {why}"))
        self._unseat(seat)
        self._beats = 0

    def _unseat(self, seat: Seat) -> None:
        if seat.resident:
            assert self._loop is not None
            seat.resident = False
            self._thread.submit(self._loop.leave, seat.trial_id)

    @staticmethod
    def _hand_out(seat: Seat, result: Result) -> None:
        if seat.waiting is not None and not seat.waiting.done():
            seat.waiting.set_result(result)
        seat.waiting = None

    def _turn(self) -> None:
        """Do what the state of the table asks for: hand out one result, or start a round."""
        while not self._busy and not self._closed and self._seats and self._settled():
            held = sorted(name for name, seat in self._seats.items() if seat.result is not None)
            if not held:
                self._busy = True
                task = asyncio.get_running_loop().create_task(self._round())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            seat = self._seats[held[0]]
            result, seat.result = seat.result, None
            assert result is not None
            self._hand_out(seat, result)
            self._beats = 0

    def _settled(self) -> bool:
        seats = self._seats
        all_wait = all(seat.waiting is not None for seat in seats.values())
        if not self._strict:
            # Refilling a slot takes a moment; a round without it would waste an interval.
            refilled = len(seats) == self._num_slots or self._roster.to_come == 0
            if all_wait and (refilled or self._beats >= 3):
                return True
            return self._beats >= self._grace_beats and self._give_up_waiting()
        live = set(self._roster.live)
        full = len(live) >= self._num_slots or self._roster.to_come == 0
        if all_wait and full and live - self._absent == set(seats):
            return True
        return self._beats >= self._grace_beats and self._give_up_waiting()

    def _give_up_waiting(self) -> bool:
        """Go on without whoever the driver lists but nobody has heard of for too long."""
        idle = [seat for seat in self._seats.values() if seat.waiting is None]
        if len(idle) == len(self._seats):
            return False
        # With several workers, those without a seat here may well have one elsewhere.
        unheard = set(self._roster.live) - set(self._seats) if self._strict else set()
        if not self._warned:
            self._warned = True
            logger.warning(
                "going on without %s after %d heartbeats; this sweep may not repeat exactly",
                sorted(unheard | {seat.trial_id for seat in idle}),
                self._beats,
            )
        for seat in idle:
            self._evict(seat, "it did not ask for its next result in time")
        self._absent |= unheard | {seat.trial_id for seat in idle}
        return True

    async def _loaded(self) -> Loop:
        if self._loading is None:
            self._loading = asyncio.get_running_loop().run_in_executor(self._thread, self._build)
        self._loop = await self._loading
        return self._loop

    def _build(self) -> Loop:
        return import_loop(self._loop_path)(
            self._config, num_slots=self._num_slots, device=self._device
        )

    async def _round(self) -> None:
        seats = dict(sorted(self._seats.items()))
        try:
            loop = await self._loaded()
            newcomers = [seat for seat in seats.values() if not seat.resident]
            refused: dict[str, Result] = {}
            accounts: dict[str, Any] = {}
            for seat in newcomers:
                outcome = await asyncio.get_running_loop().run_in_executor(
                    self._thread, _join, loop, seat
                )
                if "account" in outcome:
                    seat.resident = True
                    accounts[seat.trial_id] = outcome["account"]
                else:
                    refused[seat.trial_id] = outcome
            # A newcomer that the roster dropped meanwhile must not stay in the loop.
            for seat in newcomers:
                if self._seats.get(seat.trial_id) is not seat:
                    self._unseat(seat)
            started = time.monotonic()
            results: dict[str, Result] = {}
            if any(seat.resident for seat in seats.values()):
                results = await asyncio.get_running_loop().run_in_executor(
                    self._thread, loop.advance
                )
            round_s = time.monotonic() - started
        except Exception as error:  # the process's border: whatever it is, the trials must hear it
            self._break(seats, error)
            return
        self._busy = False
        for name, seat in seats.items():
            if self._seats.get(name) is not seat:
                continue
            seat.result = {**refused.get(name, {}), **results.get(name, {}), "round_s": round_s}
            seat.step = seat.result.get("step", seat.step)
            if name in accounts:
                seat.result["account"] = accounts[name]
        if not self._strict:
            for seat in seats.values():
                if seat.result is not None and self._seats.get(seat.trial_id) is seat:
                    result, seat.result = seat.result, None
                    self._hand_out(seat, result)
        self._moved()

    def _break(self, seats: dict[str, Seat], error: Exception) -> None:
        """Tell every trial, then end the process: a pack that failed cannot be trusted."""
        logger.error("a round failed", exc_info=error)
        for name in seats:
            seat = self._seats.pop(name, None)
            if seat is not None and seat.waiting is not None and not seat.waiting.done():
                seat.waiting.set_exception(error)
        asyncio.get_running_loop().call_later(1.0, self._exit_process, 1)


def _join(loop: Loop, seat: Seat) -> Result:
    """Seat a trial in the loop, or say why it cannot be: the others go on without it."""
    try:
        if seat.files is None:
            return {"account": loop.join(seat.trial_id, seat.config, None)}
        with tempfile.TemporaryDirectory() as folder:
            write_files(seat.files, Path(folder))
            return {"account": loop.join(seat.trial_id, seat.config, Path(folder))}
    except Exception as error:  # recorded as this trial's end, with its type and message
        logger.error("%s cannot join", seat.trial_id, exc_info=error)
        memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
        return {
            "status": "out_of_memory" if memory else "failed",
            "reason": f"{type(error).__name__}: {error}",
        }
