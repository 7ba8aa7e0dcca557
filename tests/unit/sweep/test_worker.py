import asyncio
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from higgs_tune.config import TrialConfig
from higgs_tune.errors import ModelError
from higgs_tune.sweep.seats import CHECKPOINT_INFO, Roster, SlotLostError, import_loop
from higgs_tune.sweep.worker import Worker
from tests.sweep_fakes import FakeLoop


@pytest.fixture(autouse=True)
def _fast_rounds(monkeypatch):
    monkeypatch.setenv("FAKE_ROUND_S", "0.001")


def run(scenario: "Coroutine[Any, Any, None]") -> None:
    """Run to the end, but never hang the suite."""

    async def bounded() -> None:
        await asyncio.wait_for(scenario, 60)

    asyncio.run(bounded())


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


def make_worker(make_config, *, slots=2, strict=True, **kwargs) -> Worker:
    kwargs.setdefault("exit_process", lambda code: None)
    return Worker(
        make_config(**kwargs.pop("sections", {})),
        num_slots=slots,
        strict=strict,
        device="cpu",
        loop_path="tests.sweep_fakes:FakeLoop",
        **kwargs,
    )


async def never(task: "asyncio.Task[Any]") -> bool:
    """Whether the task still waits after everything that could run has run."""
    for _ in range(50):
        await asyncio.sleep(0.002)
    return not task.done()


def asking(worker: Worker, trial_id: str) -> "asyncio.Task[dict[str, Any]]":
    return asyncio.get_running_loop().create_task(worker.next_result(trial_id))


async def beat(worker: Worker, roster: Roster, times: int) -> None:
    """The driver's heartbeat; what waits to run may run before each."""
    for _ in range(times):
        await asyncio.sleep(0.002)
        await worker.sync(roster)


async def seat(worker: Worker, *names: str, version: int = 1, **changes: Any) -> None:
    for name in names:
        assert await worker.join(name, trial(**changes), None, version)


def test_a_round_waits_for_everyone_on_the_roster(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await worker.sync(Roster(1, ("t0", "t1"), 3))
        await seat(worker, "t0", "t1")
        first = asking(worker, "t0")
        assert await never(first)
        second = asking(worker, "t1")
        assert (await first)["step"] == 25
        again = asking(worker, "t0")
        assert (await second)["step"] == 25
        assert await never(again)

    run(scenario())


def test_a_round_waits_for_the_trial_that_could_still_join(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await worker.sync(Roster(1, ("t0",), 1))
        await seat(worker, "t0")
        first = asking(worker, "t0")
        assert await never(first)
        await worker.sync(Roster(1, ("t0",), 0))  # e.g. the time limit: nobody will come
        assert (await first)["step"] == 25

    run(scenario())


def test_results_go_out_in_order_and_one_at_a_time(make_config):
    async def scenario():
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

    run(scenario())


def test_the_next_result_waits_for_the_successor_of_a_trial_that_left(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await worker.sync(Roster(2, ("t0", "t1"), 1))
        await seat(worker, "t0", "t1", version=2)
        tasks = [asking(worker, "t0"), asking(worker, "t1")]
        await tasks[0]
        await worker.sync(Roster(3, ("t1",), 1))  # t0 was stopped
        assert await never(tasks[1])
        await worker.sync(Roster(4, ("t1", "t2"), 0))
        assert await never(tasks[1])
        await seat(worker, "t2", version=4)
        assert await never(tasks[1])
        third = asking(worker, "t2")
        assert (await tasks[1])["step"] == 25
        second = asking(worker, "t1")
        assert (await second)["step"] == 50
        asking(worker, "t1")
        assert (await third)["step"] == 25  # its first interval, in the round after

    run(scenario())


def test_a_trial_that_is_never_heard_of_does_not_hang_the_others(make_config, caplog):
    async def scenario():
        worker = make_worker(make_config, grace_beats=5)
        await worker.sync(Roster(1, ("t0", "t1"), 0))
        await seat(worker, "t0")
        task = asking(worker, "t0")
        await beat(worker, Roster(1, ("t0", "t1"), 0), 6)
        assert (await task)["step"] == 25
        assert (await worker.next_result("t0"))["step"] == 50  # it is not waited for twice
        assert len([line for line in caplog.messages if "going on without" in line]) == 1

    run(scenario())


def test_a_trial_that_stops_asking_loses_its_slot_and_can_come_back(make_config):
    async def scenario():
        worker = make_worker(make_config, grace_beats=5)
        roster = Roster(1, ("t0", "t1"), 0)
        await worker.sync(roster)
        await seat(worker, "t0", "t1")
        tasks = [asking(worker, "t0"), asking(worker, "t1")]
        await tasks[0]
        files = await worker.save("t0")
        await beat(worker, roster, 6)
        await tasks[1]
        with pytest.raises(SlotLostError, match="t0 has no slot"):
            await worker.next_result("t0")
        assert await worker.join("t0", trial(), files, 1)
        back, other = asking(worker, "t0"), asking(worker, "t1")
        assert (await back)["step"] == 50
        asking(worker, "t0")
        assert (await other)["step"] == 50

    run(scenario())


def test_a_full_worker_refuses_and_a_newer_process_takes_over_its_own_trial(make_config):
    async def scenario():
        worker = make_worker(make_config, slots=1)
        await seat(worker, "t0")
        assert not await worker.join("t1", trial(), None, 1)
        old = asking(worker, "t0")
        await asyncio.sleep(0)
        assert await worker.join("t0", trial(), None, 1)
        with pytest.raises(SlotLostError, match="took over"):
            await old

    run(scenario())


def test_a_saved_trial_goes_on_where_it_was(make_config):
    async def scenario():
        worker = make_worker(make_config, slots=1)
        await worker.sync(Roster(1, ("t0",), 0))
        await seat(worker, "t0")
        await worker.next_result("t0")
        files = await worker.save("t0")
        assert set(files) == {"adapter_config.json", "training_state.json", CHECKPOINT_INFO}
        await worker.next_result("t0")
        await worker.restore("t0", files)
        assert (await worker.next_result("t0"))["step"] == 50

    run(scenario())


def test_a_trial_that_cannot_join_fails_alone(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await worker.sync(Roster(1, ("t0", "t1"), 0))
        await seat(worker, "t0", batch_clips=13)
        await seat(worker, "t1")
        refused, fine = asking(worker, "t0"), asking(worker, "t1")
        result = await refused
        assert result["status"] == "out_of_memory"
        assert result["reason"] == "MemoryError: 13 clips do not fit"
        await worker.sync(Roster(2, ("t1",), 0))
        assert (await fine)["status"] == "running"

    run(scenario())


def test_the_account_comes_with_the_first_result_only(make_config):
    async def scenario():
        worker = make_worker(make_config, slots=1)
        await worker.sync(Roster(1, ("t0",), 0))
        await seat(worker, "t0")
        assert (await worker.next_result("t0"))["account"]["parameters"] == 8000
        assert "account" not in await worker.next_result("t0")

    run(scenario())


def test_a_failed_round_reaches_every_trial_and_ends_the_process(make_config, monkeypatch):
    def explode(self):
        raise RuntimeError("device lost")

    async def scenario():
        monkeypatch.setattr(FakeLoop, "advance", explode)
        ended = asyncio.get_running_loop().create_future()
        worker = make_worker(make_config, exit_process=ended.set_result)
        await worker.sync(Roster(1, ("t0", "t1"), 0))
        await seat(worker, "t0", "t1")
        tasks = [asking(worker, "t0"), asking(worker, "t1")]
        for task in tasks:
            with pytest.raises(RuntimeError, match="device lost"):
                await task
        assert await asyncio.wait_for(ended, 10) == 1

    run(scenario())


def test_a_base_that_cannot_be_loaded_is_told_as_it_is(make_config):
    async def scenario():
        worker = make_worker(make_config, sections={"base": {"path": "broken"}})
        with pytest.raises(ModelError, match="no such checkpoint"):
            await worker.describe()

    run(scenario())


def test_closing_lets_everyone_go(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await worker.sync(Roster(1, ("t0", "t1"), 0))
        await seat(worker, "t0", "t1")
        task = asking(worker, "t0")
        await asyncio.sleep(0)
        await worker.close()
        assert (await task)["status"] == "cancelled"
        assert (await worker.next_result("t1"))["status"] == "cancelled"

    run(scenario())


def test_an_old_roster_does_not_evict_a_trial_it_cannot_know(make_config):
    async def scenario():
        worker = make_worker(make_config)
        await seat(worker, "t5", version=9)
        await worker.sync(Roster(8, (), 1))
        await worker.sync(Roster(9, ("t5",), 0))
        assert (await worker.next_result("t5"))["step"] == 25

    run(scenario())


def test_one_of_several_workers_does_not_wait_for_the_trials_of_the_others(make_config):
    async def scenario():
        worker = make_worker(make_config, strict=False)
        await worker.sync(Roster(1, ("t0", "t1", "t2"), 0))
        await seat(worker, "t1")
        assert (await worker.next_result("t1"))["step"] == 25

    run(scenario())


def test_one_of_several_workers_gives_a_successor_a_moment(make_config):
    async def scenario():
        worker = make_worker(make_config, strict=False)
        roster = Roster(1, ("t0", "t1", "t2"), 4)
        await worker.sync(roster)
        await seat(worker, "t1")
        task = asking(worker, "t1")
        assert await never(task)
        await beat(worker, roster, 3)
        assert (await task)["step"] == 25

    run(scenario())


def test_one_of_several_workers_goes_on_without_a_trial_that_stops_asking(make_config, caplog):
    async def scenario():
        worker = make_worker(make_config, strict=False, grace_beats=5)
        roster = Roster(1, ("t0", "t1", "t2"), 0)
        await worker.sync(roster)
        await seat(worker, "t0", "t1")
        task = asking(worker, "t1")
        assert await never(task)
        await beat(worker, roster, 6)
        assert (await task)["step"] == 25
        with pytest.raises(SlotLostError, match="t0 has no slot"):
            await worker.next_result("t0")
        assert "going on without ['t0']" in caplog.text  # t2 sits elsewhere

    run(scenario())


def drive(make_config, tmp_path: Path, seed: int) -> list[tuple[str, int]]:
    """Run seven trials through two slots with racing clients; the order in which results arrive."""
    rng = random.Random(seed)
    arrived: list[tuple[str, int]] = []

    async def scenario():
        worker = make_worker(make_config)
        names = [f"t{index}" for index in range(7)]
        state = {"version": 0, "live": [], "queue": list(names)}

        async def publish():
            state["version"] += 1
            live = tuple(state["live"])
            await worker.sync(Roster(state["version"], live, len(state["queue"])))

        async def client(name: str, version: int):
            await asyncio.sleep(rng.random() * 0.01)
            await worker.join(name, trial(), None, version)
            while True:
                await asyncio.sleep(rng.random() * 0.01)
                result = await worker.next_result(name)
                arrived.append((name, result["step"]))
                await asyncio.sleep(rng.random() * 0.01)
                stopped = int(name[1:]) % 3 == 0 and result["step"] >= 50
                if result["status"] != "running" or stopped:
                    break
            state["live"].remove(name)
            await publish()
            await start()

        tasks = []

        async def start():
            if state["queue"]:
                name = state["queue"].pop(0)
                state["live"].append(name)
                await publish()
                tasks.append(asyncio.create_task(client(name, state["version"])))

        await start()
        await start()
        while len(tasks) < len(names) or not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)

    run(scenario())
    return arrived


def test_racing_clients_see_the_same_order_every_time(make_config, tmp_path):
    first = drive(make_config, tmp_path, seed=1)
    assert len({name for name, _ in first}) == 7
    assert all(drive(make_config, tmp_path, seed=seed) == first for seed in (2, 3, 4))


def test_nothing_of_torch_is_needed_to_import_a_worker():
    code = (
        "import sys, higgs_tune.sweep.worker, higgs_tune.sweep.trainable, higgs_tune.sweep.space;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


@pytest.mark.parametrize("path", ["json:dumps", "no_such_module:name"])
def test_garbage_is_collected_again_after_the_loop_is_imported(path):
    with contextlib.suppress(ModuleNotFoundError):
        assert import_loop(path) is json.dumps
    assert gc.isenabled()
