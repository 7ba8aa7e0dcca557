"""What a worker does about trials that fall silent, cannot join or fail, and when it ends itself."""

import asyncio
import errno
import logging

import pytest

from higgs_tune.errors import DataError, HiggsTuneError, ModelError
from higgs_tune.sweep.seats import Roster, SlotLostError
from higgs_tune.sweep.worker import pack
from tests.fake_loop import FakeLoop
from tests.workers import asking, beat, broken_join, make_worker, never, saved, seat, trial

pytestmark = pytest.mark.usefixtures("fast_rounds")


async def test_a_trial_that_is_never_heard_from_does_not_block_the_others(make_config, caplog):
    worker = make_worker(make_config, grace_beats=5)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0")
    task = asking(worker, "t0")
    await beat(worker, Roster(1, ("t0", "t1"), 0), 6)
    assert (await task)["step"] == 25
    assert (await worker.next_result("t0"))["step"] == 50  # it is not waited for twice
    assert len([line for line in caplog.messages if "going on without" in line]) == 1


async def test_a_roster_update_is_not_counted_as_a_heartbeat(make_config, caplog):
    worker = make_worker(make_config, grace_beats=5)
    roster = Roster(1, ("t0", "t1"), 0)
    await seat(worker, "t0")
    task = asking(worker, "t0")
    assert await never(task)
    for _ in range(100):  # a hundred trials come and go within a second
        await worker.sync(roster)
    await beat(worker, roster, 4)
    assert not task.done()
    assert not [line for line in caplog.messages if "going on without" in line]
    await beat(worker, roster, 1)
    assert (await task)["step"] == 25


async def test_a_trial_that_stops_asking_loses_its_slot_and_can_come_back(make_config):
    worker = make_worker(make_config, grace_beats=5)
    roster = Roster(1, ("t0", "t1"), 0)
    await worker.sync(roster)
    await seat(worker, "t0", "t1")
    tasks = [asking(worker, "t0"), asking(worker, "t1")]
    await tasks[0]
    files = await saved(worker, "t0")
    await beat(worker, roster, 6)
    await tasks[1]
    with pytest.raises(SlotLostError, match="t0 has no slot"):
        await worker.next_result("t0")
    assert await worker.join("t0", trial(), files, 1, 0) == "seated"
    back, other = asking(worker, "t0"), asking(worker, "t1")
    assert (await other)["step"] == 50
    asking(worker, "t1")
    assert (await back)["step"] == 50


async def test_a_trial_that_cannot_join_fails_alone(make_config, monkeypatch):
    error = ModelError("its file is damaged")
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    monkeypatch.setattr(FakeLoop, "join", broken_join(error, num_beside=1))
    await seat(worker, "t0", "t1")
    fine, refused = asking(worker, "t0"), asking(worker, "t1")
    result = await refused
    assert result["status"] == "failed"
    assert result["reason"] == "ModelError: its file is damaged"
    await worker.sync(Roster(2, ("t0",), 0))
    assert (await fine)["status"] == "running"


def unreadable() -> ModelError:
    """What reading a checkpoint raises on a disk that fails."""
    error = ModelError("not a readable adapter")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    return error


@pytest.mark.parametrize("sick", ["check", "file", "checkpoint"])
async def test_a_join_that_fails_through_the_machine_ends_the_process_not_the_trial(
    make_config, monkeypatch, sick
):
    def not_even_the_base(self):
        raise RuntimeError("CUDA error: an illegal memory access")

    error = {
        "check": ValueError("t0"),
        "file": OSError(errno.EIO, "Input/output error"),
        "checkpoint": unreadable(),
    }[sick]
    monkeypatch.setattr(FakeLoop, "join", broken_join(error))
    if sick == "check":
        monkeypatch.setattr(FakeLoop, "check", not_even_the_base)

    ended = asyncio.get_running_loop().create_future()
    worker = make_worker(make_config, exit_process=ended.set_result)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0")
    with pytest.raises(Exception, match=r"illegal memory|Input/output|readable adapter"):
        await worker.next_result("t0")
    assert await asyncio.wait_for(ended, 10) == 1


async def test_a_checkpoint_that_fills_the_disk_ends_the_process_not_the_trial(
    make_config, monkeypatch
):
    def full(files, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack, "write_files", full)
    ended = asyncio.get_running_loop().create_future()
    worker = make_worker(make_config, exit_process=ended.set_result)
    await worker.sync(Roster(1, ("t0",), 0))
    assert await worker.join("t0", trial(), {"a": b""}, 1, 0) == "seated"
    with pytest.raises(OSError, match="No space left"):  # Tune retries the trial
        await asking(worker, "t0")
    assert await asyncio.wait_for(ended, 10) == 1


async def test_a_failed_round_reaches_every_trial_and_ends_the_process(make_config, monkeypatch):
    def explode(self, stop):
        raise RuntimeError("device lost")

    monkeypatch.setattr(FakeLoop, "advance", explode)
    ended = asyncio.get_running_loop().create_future()
    worker = make_worker(make_config, exit_process=ended.set_result)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    tasks = [asking(worker, "t0"), asking(worker, "t1")]
    for task in tasks:
        with pytest.raises(RuntimeError, match="device lost"):
            await task
    assert await worker.join("t0", trial(), None, 1, 1) == "away"  # it would fail once more
    await worker.sync(Roster(1, ("t0", "t1"), 0, None, {"t0": trial(), "t1": trial()}))
    with pytest.raises(SlotLostError, match="t0 has no slot"):
        await worker.next_result("t0")
    assert await asyncio.wait_for(ended, 10) == 1


async def test_no_trial_is_seated_before_the_driver_has_accepted_what_was_loaded(make_config):
    worker = make_worker(make_config, accepted=False, grace_beats=3)
    roster = Roster(1, ("t0", "t1"), 0)
    ready = asyncio.create_task(worker.ready())
    await beat(worker, roster, 10)  # however long that takes, no trial counts as silent
    assert (await worker.describe())["content_hash"] == "0" * 64
    assert await never(ready)
    assert await worker.join("t0", trial(), None, 1, 1) == "away"
    serving = asyncio.create_task(worker.serve())
    await ready
    assert await worker.join("t0", trial(), None, 1, 1) == "seated"
    task = asking(worker, "t0")
    await worker.sync(roster, beat=True)
    assert await never(task)  # t1 is waited for
    await seat(worker, "t1")
    other = asking(worker, "t1")
    assert (await task)["step"] == 25
    assert not serving.done()
    other.cancel()


async def test_closing_a_worker_that_loads_cancels_the_trials_waiting_for_it(
    make_config, monkeypatch
):
    monkeypatch.setattr(FakeLoop, "__init__", lambda self, config, **_: pytest.fail("it loads"))

    worker = make_worker(make_config, accepted=False)
    await worker.sync(Roster(1, ("t0",), 0))
    ready = asyncio.create_task(worker.ready())
    assert await never(ready)
    await worker.close()
    await ready
    assert await worker.join("t0", trial(), None, 1, 1) == "seated"
    assert (await worker.next_result("t0"))["status"] == "cancelled"


async def test_a_workers_warning_is_reported_once(make_config):
    logger = logging.getLogger("higgs_tune.train.room")
    worker = make_worker(make_config, accepted=False)
    logger.warning("before anyone %s", "listens")
    first = await worker.serve()
    assert len(first) == 1
    assert first[0].endswith("WARNING higgs_tune.train.room: before anyone listens")
    second = asyncio.create_task(worker.serve())
    assert await never(second)
    await asyncio.to_thread(logger.warning, "from the pack's thread")
    assert [text[-22:] for text in await second] == ["from the pack's thread"]


async def test_why_the_pack_failed_is_reported_before_the_process_ends(make_config, monkeypatch):
    def explode(self, stop):
        raise RuntimeError("device lost")

    monkeypatch.setattr(FakeLoop, "advance", explode)
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0",), 0))
    serving = asyncio.create_task(worker.serve())
    await seat(worker, "t0")
    with pytest.raises(RuntimeError, match="device lost"):
        await worker.next_result("t0")
    (text,) = await serving
    assert "the pack failed" in text
    assert "in explode" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("data.path: no such folder"), r"^on node \S+: data\.path: no such folder$"),
        (RuntimeError("CUDA"), r"^on node \S+ cannot load base and data: RuntimeError: CUDA$"),
        (
            MemoryError("full"),
            r"^on node \S+ finds no memory for base and data: MemoryError: full$",
        ),
    ],
)
async def test_an_error_while_loading_names_the_node(make_config, monkeypatch, error, message):
    def fail(self, config, **_):
        raise error

    monkeypatch.setattr(FakeLoop, "__init__", fail)
    with pytest.raises(HiggsTuneError, match=message):
        await make_worker(make_config).describe()
