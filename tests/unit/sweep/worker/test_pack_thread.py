"""A pack that hangs: what a worker logs, and when its process ends."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from higgs_tune.errors import SweepError
from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker import pack_thread
from higgs_tune.sweep.worker.pack_thread import PackThread
from tests.fake_loop import FakeLoop
from tests.workers import asking, beat, make_worker, seat

WARN, END = 3, 6


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(pack_thread, "WARN_BEATS", WARN)
    monkeypatch.setattr(pack_thread, "END_BEATS", END)


@pytest.fixture
def lock() -> Iterator[threading.Event]:
    """An event that a call waits for; set at the end, or the call's thread would stay."""
    event = threading.Event()
    yield event
    event.set()


def ends_after(thread: PackThread, beats: int) -> int | None:
    """At which of `beats` heartbeats without progress the process is to end; None: at none."""
    return next((number for number in range(1, beats + 1) if thread.beat(7)), None)


async def test_a_call_that_hangs_is_logged_with_its_stack_and_then_ends_the_process(lock, caplog):
    def wait_for_the_gpu() -> None:
        lock.wait()

    thread = PackThread(ends=True)
    running = thread.run(wait_for_the_gpu)
    await asyncio.sleep(0.05)
    assert not thread.beat(7)  # it has begun since the last heartbeat
    assert [thread.beat(7) for _ in range(WARN - 1)] == [False] * (WARN - 1)
    assert not caplog.messages
    assert not thread.beat(7)
    (text,) = caplog.messages
    assert "has computed nothing" in text
    assert "in wait_for_the_gpu" in text
    assert ends_after(thread, END) == END - WARN
    lock.set()
    await running


async def test_forwards_and_further_calls_count_as_progress(lock, caplog):
    thread = PackThread(ends=True)
    first, second = thread.run(lock.wait), thread.run(lock.wait)
    assert not any(thread.beat(number) for number in range(10 * END))
    lock.set()
    await asyncio.gather(first, second)
    lock.clear()
    for _ in range(10):
        running = thread.run(lock.wait)
        assert ends_after(thread, END) is None  # the first heartbeat sees that a call has begun
        lock.set()
        await running
        lock.clear()
    assert len([text for text in caplog.messages if "computed nothing" in text]) == 10


async def test_a_pack_with_nothing_to_do_is_not_taken_for_hanging(caplog):
    thread = PackThread(ends=True)
    assert ends_after(thread, 10 * END) is None
    await thread.run(lambda: None)
    assert ends_after(thread, 10 * END) is None
    assert not caplog.messages


async def test_a_process_that_may_compile_for_long_is_not_ended(lock, caplog):
    thread = PackThread(ends=False)
    running = thread.run(lock.wait)
    assert ends_after(thread, 10 * END) is None
    assert len(caplog.messages) == 1
    assert "torch.compile" in caplog.text
    lock.set()
    await running


async def test_a_worker_that_hangs_raises_in_its_trials_calls_and_ends(
    make_config, monkeypatch, lock
):
    monkeypatch.setattr(FakeLoop, "advance", lambda self, stop: lock.wait() and {})

    ended = asyncio.get_running_loop().create_future()
    worker = make_worker(make_config, exit_process=ended.set_result)
    roster = Roster(1, ("t0", "t1"), 0)
    await worker.sync(roster)
    await seat(worker, "t0", "t1")
    tasks = [asking(worker, "t0"), asking(worker, "t1")]
    await asyncio.sleep(0.05)
    await beat(worker, roster, 3 * END)
    for task in tasks:
        with pytest.raises(SweepError, match="the pack has hung"):
            await task
    assert await asyncio.wait_for(ended, 10) == 1
