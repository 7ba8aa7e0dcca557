"""What a worker does when memory is short: for a joining trial, for all trials, for its base."""

import asyncio
import weakref
from array import array

import pytest

from higgs_tune.errors import NoMemoryError
from higgs_tune.sweep.seats import Roster
from tests.fake_loop import FakeLoop
from tests.workers import asking, broken_join, make_worker, never, seat

pytestmark = pytest.mark.usefixtures("fast_rounds")


async def test_a_trial_without_memory_beside_others_waits_until_one_leaves(
    make_config, monkeypatch, caplog
):
    worker = make_worker(make_config, slots=3)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    error = MemoryError("its new modules")
    monkeypatch.setattr(FakeLoop, "join", broken_join(error, num_beside=1))
    await seat(worker, "t0", "t1")
    asking(worker, "t1")
    for step in (25, 50, 75, 100):
        assert (await worker.next_result("t0"))["step"] == step
    await worker.sync(Roster(2, ("t1",), 0))
    loop = await worker._loaded()
    assert isinstance(loop, FakeLoop)
    while len(loop.log) < 3:
        await asyncio.sleep(0.002)
    (warning,) = [line for line in caplog.messages if "no memory for its slot" in line]
    assert warning.startswith("t1 ") and "tune.slots_per_worker" in warning
    assert [entry[:2] for entry in loop.log] == [
        ("join", "t0"),
        ("leave", "t0"),
        ("join", "t1"),
    ]


async def test_a_trial_that_finds_no_memory_alone_in_the_pack_ends(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0", batch_clips=13)
    result = await worker.next_result("t0")
    assert result["status"] == "out_of_memory"
    assert result["reason"] == "MemoryError: 13 clips do not fit"


def ends_at_once(self, stop):
    """An interval in which memory runs out for all trials."""
    full = {
        "status": "out_of_memory",
        "reason": "not even one conversation fits in a training step",
    }
    return {trial_id: {"step": 0, **full} for trial_id in self._steps}


@pytest.mark.parametrize("when", ["join", "training"])
async def test_a_process_without_memory_for_the_base_ends_itself_not_its_trials(
    make_config, monkeypatch, when
):
    def nothing_left(self):
        assert not self.num_residents
        raise MemoryError("not even the base")

    monkeypatch.setattr(FakeLoop, "check", nothing_left)
    if when == "join":
        monkeypatch.setattr(FakeLoop, "join", broken_join(MemoryError("its new modules")))
    else:
        monkeypatch.setattr(FakeLoop, "advance", ends_at_once)

    ended = asyncio.get_running_loop().create_future()
    worker = make_worker(make_config, exit_process=ended.set_result)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    for task in [asking(worker, "t0"), asking(worker, "t1")]:
        with pytest.raises(MemoryError, match="not even the base"):
            await task
    assert await asyncio.wait_for(ended, 10) == 1


async def test_trials_end_if_they_run_out_of_memory_but_the_base_does_not(make_config, monkeypatch):
    checked = []
    monkeypatch.setattr(FakeLoop, "check", lambda self: checked.append(self))
    monkeypatch.setattr(FakeLoop, "advance", ends_at_once)

    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    for task in [asking(worker, "t0"), asking(worker, "t1")]:
        assert (await task)["status"] == "out_of_memory"
        await worker.sync(Roster(2, ("t1",), 0))
    assert checked


async def test_a_join_that_exhausts_host_memory_ends_as_out_of_memory(make_config, monkeypatch):
    def full(self, *args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(FakeLoop, "join", full)
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0")
    assert (await asking(worker, "t0"))["status"] == "out_of_memory"


async def test_a_worker_that_finds_memory_for_its_base_later_takes_trials(make_config, monkeypatch):
    left = [MemoryError("taken"), RuntimeError("CUDA error: out of memory")]
    plain = FakeLoop.__init__
    half_loaded: list[weakref.ref] = []

    def load(self, config, **kwargs):
        weights = array("b", [0])
        half_loaded.append(weakref.ref(weights))
        if left:
            raise left.pop()
        plain(self, config, **kwargs)

    monkeypatch.setattr(FakeLoop, "__init__", load)
    worker = make_worker(make_config, accepted=False)
    await worker.sync(Roster(1, ("t0",), 0))
    ready = asyncio.create_task(worker.ready())
    for _ in range(2):
        with pytest.raises(NoMemoryError, match="finds no memory"):
            await worker.describe()
        assert half_loaded[-1]() is None  # its memory is free for the next try
        assert await never(ready)
    assert (await worker.describe())["content_hash"] == "0" * 64
    serving = asyncio.create_task(worker.serve())
    await ready
    await seat(worker, "t0")
    assert (await worker.next_result("t0"))["step"] == 25
    assert not serving.done()
