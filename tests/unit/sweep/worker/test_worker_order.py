"""The order of a worker's results and joins: one worker is repeatable, several do not wait."""

import asyncio
import json
import random
from typing import Any

import pytest

from higgs_tune.errors import ModelError
from higgs_tune.sweep.seats import Roster, SlotLostError, num_seats
from tests.fake_loop import FakeLoop
from tests.workers import asking, beat, make_worker, run, saved, seat, trial

pytestmark = pytest.mark.usefixtures("fast_rounds")


async def test_one_of_several_workers_does_not_wait_for_the_trials_of_the_others(make_config):
    worker = make_worker(make_config, strict=False)
    await worker.sync(Roster(1, ("t0", "t1", "t2"), 0))
    await seat(worker, "t1")
    assert (await worker.next_result("t1"))["step"] == 25


async def test_one_of_several_workers_goes_on_without_a_successor_and_seats_it_at_its_next_step(
    make_config,
):
    worker = make_worker(make_config, strict=False)
    await worker.sync(Roster(1, ("t0", "t1", "t2"), 4))
    await seat(worker, "t1")
    assert (await worker.next_result("t1"))["step"] == 25
    task = asking(worker, "t1")
    await seat(worker, "t2", version=1)
    other = asking(worker, "t2")
    assert (await other)["step"] == 25
    assert (await task)["step"] == 50
    loop = await worker._loaded()
    joined = loop.log[-1]
    assert joined[:2] == ("join", "t2")
    assert joined[2] % 25 != 0
    await worker.sync(Roster(2, ("t2",), 4))  # t1 was stopped
    while len(loop.log) < 3:
        await asyncio.sleep(0.001)
    assert loop.log[-1][:2] == ("leave", "t1")


async def test_one_of_several_workers_frees_the_slot_of_a_trial_that_stops_asking(
    make_config, caplog, monkeypatch
):
    worker = make_worker(make_config, strict=False, grace_beats=5)
    roster = Roster(1, ("t0", "t1", "t2"), 0)
    await worker.sync(roster)
    await seat(worker, "t0", "t1")
    first, second = asking(worker, "t0"), asking(worker, "t1")
    assert (await first)["step"] == 25
    assert (await second)["step"] == 25
    monkeypatch.setenv("FAKE_ROUND_S", "0.3")
    assert (await worker.next_result("t1"))["step"] == 50
    task = asking(worker, "t1")
    await beat(worker, roster, 6)
    assert not task.done()
    with pytest.raises(SlotLostError, match="t0 has no slot"):
        await worker.next_result("t0")
    assert (await task)["step"] == 75
    assert (await worker._loaded()).log[-1][:2] == ("leave", "t0")
    assert "going on without ['t0']" in caplog.text  # t2 sits elsewhere


def drive(
    make_config,
    seed: int,
    delay_s: float,
    slots: int = 2,
    pruned: tuple[str, ...] = ("t0", "t3", "t7"),
    early: bool = True,
) -> tuple[list[tuple], list[tuple]]:
    """Run nine trials through the slots with racing clients that decide slowly.

    Args:
        early: whether trials train before their processes come.

    Returns:
        The results in order of arrival, and which trials joined and left after which step.
    """
    rng = random.Random(seed)
    arrived: list[tuple[Any, ...]] = []
    log: list[tuple[str, str, int]] = []

    async def scenario():
        worker = make_worker(make_config, slots=slots)
        names = [f"t{index}" for index in range(9)]
        state = {"version": 0, "live": [], "queue": list(names), "room": slots}
        configs = {
            name: trial(num_steps={"t4": 51, "t6": 26, "t7": 55}.get(name, 100)) for name in names
        }
        heard: set[str] = set()  # the trials that the driver has had a result of

        async def publish():
            state["version"] += 1
            live = tuple(state["live"])
            new = {name: configs[name] for name in live if early and name not in heard}
            roster = Roster(state["version"], live, len(state["queue"]), state["room"], new)
            await worker.sync(roster)

        async def pause():
            await asyncio.sleep(rng.random() * delay_s)

        async def client(name: str, version: int):
            for attempt in range(rng.choice([1, 3])):  # all but the last die before they ask
                await pause()
                assert await worker.join(name, configs[name], None, version, attempt) == "seated"
            assert await worker.join(name, configs[name], None, version, -1) == "outdated"
            while True:
                await pause()
                result = await worker.next_result(name)
                heard.add(name)
                step = result.get("step", 0)
                arrived.append((name, step, result.get("val/text/nll")))
                await pause()
                if step:
                    files = await saved(worker, name)
                    assert json.loads(files["training_state.json"])["step"] == step
                stopped = name in pruned and step >= 50
                if result["status"] != "running" or stopped:
                    break
            state["live"].remove(name)
            await publish()
            await pause()
            await start()

        tasks = []

        async def start():
            if state["queue"]:
                name = state["queue"].pop(0)
                state["live"].append(name)
                await publish()
                tasks.append(asyncio.create_task(client(name, state["version"])))

        for _ in range(slots):
            await start()
        await worker.trains()
        await pause()
        state["room"] = num_seats(slots, strict=True)
        for _ in range(state["room"] - slots):
            await start()
            await pause()
        while len(tasks) < len(names) or not all(task.done() for task in tasks):
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)
        log.extend((await worker._loaded()).log)

    run(scenario())
    return arrived, log


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("bad", [{"t0"}, {"t0", "t1"}, {"t5"}])
def test_trials_that_cannot_join_do_not_block_the_others(make_config, monkeypatch, slots, bad):
    join = FakeLoop.join

    def damaged(self, trial_id, *args):
        if trial_id in bad:
            raise ModelError("damaged checkpoint")
        return join(self, trial_id, *args)

    monkeypatch.setattr(FakeLoop, "join", damaged)
    arrived, _ = drive(make_config, seed=1, delay_s=0.002, slots=slots, pruned=())
    assert {name for name, *_ in arrived} == {f"t{n}" for n in range(9)}
    assert {name for name, _, text in arrived if text is None} == bad


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 4), (0.05, 5), (0.5, 6)])
async def test_a_pack_trains_a_share_of_an_interval_ahead_of_a_decision(
    make_config, fraction, steps
):
    sections = {
        "tune": {"ahead_fraction": fraction},
        "train": {"num_steps": 100, "report_every_steps": 4},
    }
    worker = make_worker(make_config, slots=1, sections=sections)
    await worker.sync(Roster(1, ("t1",), 0))
    await worker.join("t1", trial(report_every_steps=4), None, 1, 1)
    assert (await worker.next_result("t1"))["step"] == 4
    while worker._table.line.clock < steps:
        await asyncio.sleep(0.002)
    await asyncio.sleep(0.1)  # no decision comes
    assert worker._table.line.clock == steps


def test_late_decisions_change_neither_the_results_nor_the_steps_of_joins(make_config):
    arrived, log = drive(make_config, seed=1, delay_s=0.01)
    assert len({name for name, *_ in arrived}) == 9
    assert {kind for kind, *_ in log} == {"join", "leave"}
    # No later step of a stopped trial is reported, though it trained on.
    assert max(step for name, step, _ in arrived if name == "t0") == 50
    assert {name: step for kind, name, step in log if kind == "leave"}["t0"] == 52
    for seed, delay_s in ((2, 0.0), (3, 0.001), (4, 0.03)):
        for early in (True, False):
            assert drive(make_config, seed, delay_s, early=early) == (arrived, log)


def test_slots_freed_together_are_filled_together_however_late_decisions_are(make_config):
    pruned = ("t0", "t7")
    arrived, log = drive(make_config, seed=1, delay_s=0.01, slots=4, pruned=pruned)
    steps = {(kind, name): step for kind, name, step in log}
    # t1, t2 and t3 end on their budgets after 100 steps, with only t5 and t6 waiting
    assert {steps["leave", name] for name in ("t1", "t2", "t3")} == {100}
    assert [name for kind, name, step in log if kind == "join" and step == 100] == [
        "t5",
        "t6",
        "t7",
    ]
    for seed, delay_s in ((2, 0.0), (3, 0.001), (4, 0.03)):
        for early in (True, False):
            again = drive(make_config, seed, delay_s, slots=4, pruned=pruned, early=early)
            assert again == (arrived, log)
