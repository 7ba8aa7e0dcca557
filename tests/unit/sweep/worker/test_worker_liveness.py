"""No trial waits for ever, whichever of them die, are given up, find no memory or cannot join."""

import asyncio
import random
from itertools import count
from typing import Any

import numpy as np
import pytest

from higgs_tune.config import TrialConfig
from higgs_tune.errors import ModelError
from higgs_tune.sweep.seats import Files, Roster, SlotLostError, num_seats
from tests.fake_loop import FakeLoop
from tests.workers import make_worker, saved, trial

pytestmark = pytest.mark.usefixtures("fast_rounds")


class Driver:
    """Sends trials to one worker, stage by stage, as Tune and the searcher would."""

    def __init__(self, worker: Any, rng: random.Random, num_slots: int) -> None:
        self.worker, self.rng, self.num_slots = worker, rng, num_slots
        self.dies, self.returns = rng.choice([0, 0.1, 0.3]), rng.choice([0.0, 0.3])
        self.early = rng.choice([True, False])  # trials train before their processes come
        self.new: dict[str, TrialConfig] = {}  # live, without a result
        self.version = 0
        self.attempts = count(1)

    async def pause(self) -> None:
        await asyncio.sleep(self.rng.random() * 0.004)

    async def stage(self, names: list[str]) -> None:
        """Run all of these trials until they have ended."""
        self.live: list[str] = []
        self.queue, self.room = names, self.num_slots
        async with asyncio.timeout(10), asyncio.TaskGroup() as trials:
            helpers = [asyncio.create_task(f) for f in (self.beats(), self.open(trials))]
            await self.start(trials)
            while self.queue or self.live:
                await asyncio.sleep(0.005)
            for helper in helpers:
                helper.cancel()

    async def publish(self) -> None:
        self.version += 1
        new = dict(self.new) if self.early else {}
        roster = Roster(self.version, tuple(self.live), len(self.queue), self.room, new)
        await self.worker.sync(roster, beat=True)

    async def beats(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            await self.publish()

    async def open(self, trials: asyncio.TaskGroup) -> None:
        """Send the trials that will wait for a slot once the pack trains."""
        await self.worker.trains()
        await self.pause()
        self.room = num_seats(self.num_slots, strict=True)
        await self.publish()
        await self.start(trials)

    async def start(self, trials: asyncio.TaskGroup) -> None:
        while self.queue and len(self.live) < self.room:
            name = self.queue.pop(0)
            self.live.append(name)
            self.new[name] = trial(num_steps=self.rng.choice([26, 51, 100]))
            await self.publish()
            trials.create_task(self.life(name, self.version, trials))

    async def life(self, name: str, version: int, trials: asyncio.TaskGroup) -> None:
        """A trial's process, and those that take over if it dies, until it ends or is given up."""
        files: Files | None = None
        config = self.new[name]
        while True:
            await self.pause()
            attempt = next(self.attempts)
            while await self.worker.join(name, config, files, version, attempt) != "seated":
                await asyncio.sleep(0.002)
            has_died, files = await self.process(name, files)
            if not has_died or self.rng.random() < self.returns:
                break
        self.live.remove(name)
        self.new.pop(name, None)
        await self.publish()
        await self.pause()
        await self.start(trials)

    async def process(self, name: str, files: Files | None) -> tuple[bool, Files | None]:
        """Ask until the trial ends or is pruned; returns whether the process died, and the checkpoint."""
        while True:
            await self.pause()
            call = asyncio.ensure_future(self.worker.next_result(name))
            if self.rng.random() < self.dies:  # its process dies, its call stays open
                await asyncio.sleep(self.rng.random() * 0.02)
                call.add_done_callback(lambda done: done.cancelled() or done.exception())
                return True, files
            try:
                result = await call
            except SlotLostError:
                return True, files
            self.new.pop(name, None)
            if result.get("step"):
                content = await saved(self.worker, name)
                files = {path: np.frombuffer(data, np.uint8) for path, data in content.items()}
            if result["status"] != "running" or self.rng.random() < 0.15:
                return False, files


@pytest.mark.parametrize("seed", range(30))
async def test_no_trial_waits_for_ever(make_config, monkeypatch, seed):
    rng = random.Random(seed)
    num_slots, num_fit = rng.choice([1, 2, 3, 4]), rng.choice([99, 1, 2])
    damaged = {f"t{n}" for n in range(9) if rng.random() < rng.choice([0, 0.3])}
    join = FakeLoop.join

    def joined(self, trial_id, *args):
        if len(self._steps) >= num_fit:
            raise MemoryError("no room")
        if trial_id in damaged:
            raise ModelError("damaged")
        return join(self, trial_id, *args)

    monkeypatch.setattr(FakeLoop, "join", joined)

    driver = Driver(make_worker(make_config, slots=num_slots), rng, num_slots)
    await driver.stage([f"t{n}" for n in range(9)])
    await driver.stage([f"c{n}" for n in range(rng.choice([1, 3, 5]))])
