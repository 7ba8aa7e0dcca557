import asyncio
import contextlib
import errno
import gc
import json
import os
import subprocess
import sys

import pytest

from higgs_tune.sweep.seats import (
    CHECKPOINT_INFO,
    CheckpointError,
    Roster,
    SlotLostError,
    import_loop,
)
from tests.workers import asking, make_worker, never, saved, seat, trial

pytestmark = pytest.mark.usefixtures("fast_rounds")


async def test_the_pack_starts_when_every_trial_on_the_roster_asks(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    first = asking(worker, "t0")
    assert await never(first)
    second = asking(worker, "t1")
    assert (await first)["step"] == 25
    again = asking(worker, "t0")
    assert (await second)["step"] == 25
    assert await never(again)


async def test_the_pack_starts_when_no_other_trial_can_come(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0",), 1))
    await seat(worker, "t0")
    first = asking(worker, "t0")
    assert await never(first)
    await worker.sync(Roster(1, ("t0",), 0))  # e.g. at the time limit: no trial will come
    assert (await first)["step"] == 25


async def test_results_go_out_in_order_and_one_at_a_time(make_config):
    worker = make_worker(make_config, slots=3)
    await worker.sync(Roster(1, ("t0", "t1", "t2"), 0))
    await seat(worker, "t2", "t0", "t1")
    tasks = {name: asking(worker, name) for name in ("t1", "t2", "t0")}
    await tasks["t0"]
    assert await never(tasks["t1"])
    assert await never(tasks["t2"])
    asking(worker, "t0")
    await tasks["t1"]
    assert await never(tasks["t2"])


async def test_the_next_result_waits_for_the_successor_of_a_trial_that_left(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(3, ("t0", "t1", "t2"), 1))
    await seat(worker, "t0", "t1", "t2", version=3)
    first, second, third = (asking(worker, name) for name in ("t0", "t1", "t2"))
    await first
    await worker.sync(Roster(4, ("t1", "t2"), 1))  # t0 was stopped
    assert await never(second)
    await worker.sync(Roster(5, ("t1", "t2", "t3"), 0))
    assert (await second)["step"] == 25  # t3 has been named; its process may come later
    await seat(worker, "t3", version=5)
    fourth = asking(worker, "t3")
    second = asking(worker, "t1")
    assert (await second)["step"] == 50
    assert await never(third)  # it has t0's slot, and its result goes out after t1's
    second = asking(worker, "t1")
    assert (await third)["step"] == 25
    loop = await worker._loaded()
    # t0 left two steps, a tenth of the interval, after its report; t2 took its slot there
    assert loop.log == [
        ("join", "t0", 0), ("join", "t1", 0), ("leave", "t0", 27), ("join", "t2", 27)
    ]  # fmt: skip
    assert not fourth.done()


async def test_a_full_budget_frees_the_slot_at_once(make_config):
    worker = make_worker(make_config, slots=1)
    await worker.sync(Roster(2, ("t0", "t1"), 0))
    await seat(worker, "t0", version=2, num_steps=25)
    await seat(worker, "t1", version=2)
    first, second = asking(worker, "t0"), asking(worker, "t1")
    assert (await first)["status"] == "completed"
    assert json.loads((await saved(worker, "t0"))["training_state.json"])["step"] == 25
    await worker.sync(Roster(3, ("t1",), 0))
    assert (await second)["step"] == 25
    loop = await worker._loaded()
    assert loop.log == [("join", "t0", 0), ("leave", "t0", 25), ("join", "t1", 25)]
    figures = await worker.figures()
    assert figures["num_refills"] == 1
    assert figures["refill_max_s"] < 0.2
    assert 0 < figures["train_s"] <= figures["wall_s"]


async def test_a_checkpoint_is_of_its_results_step_although_the_pack_trains_on(make_config):
    worker = make_worker(make_config, strict=False)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0")
    result = await worker.next_result("t0")
    loop = await worker._loaded()
    while loop.num_steps < 60:  # the second report is there, but not handed out
        await asyncio.sleep(0.001)
    files = await saved(worker, "t0")
    assert result["step"] == 25
    assert json.loads(files["training_state.json"])["step"] == 25
    assert json.loads(files[CHECKPOINT_INFO]) == {"trial_id": "t0", "step": 25}
    assert (await worker.next_result("t0"))["step"] == 50
    assert json.loads((await saved(worker, "t0"))["training_state.json"])["step"] == 50


async def test_one_checkpoint_at_a_time_is_written_before_it_is_asked_for(make_config):
    written = []

    def put(files):
        written.append(json.loads(files[CHECKPOINT_INFO].tobytes())["trial_id"])
        return files

    worker = make_worker(make_config, slots=3, put=put)
    await worker.sync(Roster(1, ("t0", "t1", "t2"), 0))
    await seat(worker, "t0", "t1", "t2", num_steps=25)
    first, second, third = (asking(worker, f"t{n}") for n in range(3))
    await first
    assert await never(second)
    assert written == ["t0"]  # it has not been asked for yet
    await saved(worker, "t0")
    assert await never(second)
    assert written == ["t0", "t1"]  # the third one's must wait for memory
    await worker.sync(Roster(2, ("t1", "t2"), 0))
    await second
    assert json.loads((await saved(worker, "t1"))[CHECKPOINT_INFO])["step"] == 25
    assert await never(third)
    assert written == ["t0", "t1", "t2"]
    files = [await saved(worker, "t1") for _ in range(2)]  # given away once, then written again
    assert files[0] == files[1]
    assert written == ["t0", "t1", "t2", "t1", "t1"]


async def test_a_checkpoint_that_cannot_be_written_early_fails_when_it_is_asked_for(
    make_config, caplog
):
    room = []

    def full(files):
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return files

    worker = make_worker(make_config, slots=3, put=full)
    await worker.sync(Roster(1, ("t0", "t1", "t2"), 0))
    await seat(worker, "t0", "t1", "t2", num_steps=25)
    first, second = asking(worker, "t0"), asking(worker, "t1")
    third = asking(worker, "t2")
    await first
    assert await never(second)
    await worker.sync(Roster(2, ("t1", "t2"), 0))
    assert (await second)["status"] == "completed"
    assert await never(asyncio.Future())  # until its writing has failed
    with pytest.raises(CheckpointError, match=r" to /.*No space left .* TMPDIR"):
        await saved(worker, "t1")
    await worker.sync(Roster(3, ("t2",), 0))
    assert (await third)["status"] == "completed"
    assert await never(asyncio.Future())
    room.append(True)  # what failed before it was asked for is written again
    assert json.loads((await saved(worker, "t2"))[CHECKPOINT_INFO])["step"] == 25
    assert "a checkpoint could not be written: OSError" in caplog.text


async def test_the_pack_waits_where_a_late_decision_takes_effect(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    tasks = [asking(worker, "t0"), asking(worker, "t1")]
    await tasks[0]
    assert await never(tasks[1])
    loop = await worker._loaded()
    assert loop.num_steps == 27
    await worker.sync(Roster(2, ("t1",), 0))
    await tasks[1]
    asking(worker, "t1")
    assert await never(asyncio.Future())
    assert loop.log[-1] == ("leave", "t0", 27)
    assert loop.num_steps > 27


async def test_a_full_worker_refuses_and_a_newer_process_takes_over_its_own_trial(make_config):
    worker = make_worker(make_config, slots=1)
    await seat(worker, "t0", "t1")
    assert await worker.join("t2", trial(), None, 1, 0) == "full"
    old = asking(worker, "t0")
    await asyncio.sleep(0)
    assert await worker.join("t0", trial(), None, 1, 0) == "seated"
    with pytest.raises(SlotLostError, match="took over"):
        await old


async def test_an_outdated_process_does_not_take_over_its_trial(make_config):
    worker = make_worker(make_config, slots=1)
    await worker.sync(Roster(1, ("t0",), 0))
    assert await worker.join("t0", trial(), None, 1, 7) == "seated"
    answer = asking(worker, "t0")
    await asyncio.sleep(0)
    assert await worker.join("t0", trial(), None, 1, 6) == "outdated"
    assert (await answer)["step"] == 25


async def test_a_restored_trial_continues_from_its_checkpoint(make_config):
    worker = make_worker(make_config, slots=1)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0")
    await worker.next_result("t0")
    files = await saved(worker, "t0")
    assert set(files) == {"adapter_config.json", "training_state.json", CHECKPOINT_INFO}
    await worker.next_result("t0")
    await worker.restore("t0", files)
    assert (await worker.next_result("t0"))["step"] == 50


async def test_the_account_comes_with_the_first_result_only(make_config):
    worker = make_worker(make_config, slots=1)
    await worker.sync(Roster(1, ("t0",), 0))
    await seat(worker, "t0")
    assert (await worker.next_result("t0"))["account"]["parameters"] == 8000
    assert "account" not in await worker.next_result("t0")


async def test_closing_answers_every_trial_as_cancelled(make_config):
    worker = make_worker(make_config)
    await worker.sync(Roster(1, ("t0", "t1"), 0))
    await seat(worker, "t0", "t1")
    task = asking(worker, "t0")
    await asyncio.sleep(0)
    await worker.close()
    assert (await task)["status"] == "cancelled"
    assert (await worker.next_result("t1"))["status"] == "cancelled"


async def test_an_old_roster_does_not_evict_a_trial_it_cannot_know(make_config):
    worker = make_worker(make_config)
    await seat(worker, "t5", version=9)
    await worker.sync(Roster(8, (), 1))
    await worker.sync(Roster(9, ("t5",), 0))
    assert (await worker.next_result("t5"))["step"] == 25


def test_importing_a_worker_does_not_import_torch():
    code = (
        "import sys, higgs_tune.sweep.worker.actor, higgs_tune.sweep.trainable, higgs_tune.sweep.space;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@pytest.mark.parametrize("path", ["json:dumps", "no_such_module:name"])
def test_garbage_collection_is_on_again_after_the_loop_is_imported(path):
    with contextlib.suppress(ModuleNotFoundError):
        assert import_loop(path) is json.dumps
    assert gc.isenabled()
