"""A worker without Ray: its actor's methods run on one event loop, with the fake loop."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from higgs_tune.config import TrialConfig
from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.actor import Worker
from higgs_tune.sweep.worker.notices import Notices
from tests.fake_loop import FakeLoop


def run(scenario: "Coroutine[Any, Any, None]") -> None:
    """Run a scenario to its end; a timeout keeps it from hanging the suite."""

    async def bounded() -> None:
        await asyncio.wait_for(scenario, 60)

    try:
        asyncio.run(bounded())
    finally:
        package = logging.getLogger("higgs_tune")
        for handler in [h for h in package.handlers if isinstance(h, Notices)]:
            package.removeHandler(handler)


def trial(**changes: Any) -> TrialConfig:
    raw = {
        "rank": 8,
        "alpha": 32.0,
        "targets": ("attention",),
        "learning_rate": 1e-3,
        "num_steps": 100,
        "report_every_steps": 25,
    }
    return TrialConfig.model_validate({**raw, **changes})


def make_worker(make_config, *, slots=2, strict=True, accepted=True, **kwargs) -> Worker:
    kwargs.setdefault("exit_process", lambda code: None)
    kwargs.setdefault("put", lambda files: files)
    sections = {"tune": {"ahead_fraction": 0.1}, **kwargs.pop("sections", {})}
    worker = Worker(
        make_config(**sections),
        num_slots=slots,
        strict=strict,
        device="cpu",
        loop_path="tests.fake_loop:FakeLoop",
        **kwargs,
    )
    if accepted:
        worker._accepted.set()
    return worker


async def never(task: "asyncio.Task[Any]") -> bool:
    """Whether the task still waits after everything that could run has run."""
    for _ in range(50):
        await asyncio.sleep(0.002)
    return not task.done()


def asking(worker: Worker, trial_id: str) -> "asyncio.Task[dict[str, Any]]":
    return asyncio.get_running_loop().create_task(worker.next_result(trial_id))


async def saved(worker: Worker, trial_id: str) -> dict[str, bytes]:
    """Save a trial; returns its checkpoint's files themselves instead of Ray's references."""
    (files,) = await worker.save(trial_id)
    return {name: content.tobytes() for name, content in files.items()}


async def beat(worker: Worker, roster: Roster, times: int) -> None:
    """Send the driver's heartbeats, letting waiting tasks run before each."""
    for _ in range(times):
        await asyncio.sleep(0.002)
        await worker.sync(roster, beat=True)


async def seat(worker: Worker, *names: str, version: int = 1, **changes: Any) -> None:
    for name in names:
        assert await worker.join(name, trial(**changes), None, version, 0) == "seated"


def broken_join(error, num_beside=0):
    """A FakeLoop.join that raises `error` once `num_beside` trials are there."""
    join = FakeLoop.join

    def joined(self, *args):
        if len(self._steps) >= num_beside:
            raise error
        return join(self, *args)

    return joined
