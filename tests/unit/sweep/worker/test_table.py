"""Which trials train at which step of the pack, without a pack, an event loop or a clock."""

from pathlib import Path
from typing import Any

import pytest

from higgs_tune.config import TrialConfig
from higgs_tune.sweep.seats import Roster, num_seats
from higgs_tune.sweep.worker.occupancy import num_busy
from higgs_tune.sweep.worker.table import Table

CONFIG = TrialConfig(
    rank=8, alpha=32.0, targets=("attention",), learning_rate=1e-3, num_steps=100,
    report_every_steps=25,
)  # fmt: skip
LACKING = {"status": "out_of_memory", "reason": "MemoryError: full"}


def table_of(*names: str, slots: int, to_come: int = 0, **options: Any) -> Table:
    """A table in which these trials are seated and ask for results; those with a slot train."""
    table = Table(slots, **{"strict": True, "ahead": 5, **options})
    table.gone(Roster(1, names, to_come))
    for name in names:
        sit(table, name)
    table.next_report()
    table.take_changes()
    return table


def sit(table: Table, name: str, version: int = 1) -> None:
    assert table.join(name, CONFIG, None, version, 0) == "seated"
    table.line.seats[name].asks = True


def report(table: Table, *names: str, at: int, status: str = "running") -> list[str]:
    """Let the pack arrive at a step and validate these trials."""
    table.line.clock = at
    results = {name: {"step": at, "status": status, "of": name} for name in names}
    return table.reported(results, dict.fromkeys(names, Path.touch))


def deal(table: Table, name: str, live: tuple[str, ...], to_come: int = 0, sits: str = "") -> None:
    """Hand out an ended trial's report; then `live` are the live trials, and `sits` comes, if given."""
    found = table.next_report()
    assert found is not None
    assert found.trial_id == name
    version = table.roster.version + 1
    table.gone(Roster(version, live, to_come))
    table.drop(name)
    if sits:
        sit(table, sits, version)
    table.settled()


def changes(table: Table) -> tuple[list[str], list[str]]:
    out, joining = table.take_changes()
    return [seat.trial_id for seat in out], [seat.trial_id for seat in joining]


def test_reports_go_out_by_step_and_id_each_after_the_former_was_dealt_with():
    table = table_of("t0", "t1", "t2", slots=3)
    report(table, "t2", at=20)
    report(table, "t1", "t0", at=23)
    order = []
    for _ in range(3):
        found = table.next_report()
        assert found is not None
        assert table.next_report() is None
        order.append((found.result["step"], found.trial_id))
        table.line.seats[found.trial_id].asks = True
    assert order == [(20, "t2"), (23, "t0"), (23, "t1")]
    assert table.next_report() is None


def test_the_pack_trains_on_until_the_decision_takes_effect_and_then_waits():
    table = table_of("t0", "t1", slots=2)
    report(table, "t0", at=25)
    assert table.next_stop() == 30
    assert table.can_train()
    table.next_report()
    table.line.clock = 29
    assert table.can_train()
    table.line.clock = 30
    assert not table.can_train()
    table.line.seats["t0"].asks = True
    table.next_report()
    assert table.can_train()
    assert table.next_stop() is None


@pytest.mark.parametrize("known_at", [25, 28, 30])
def test_a_stop_and_its_successor_take_effect_at_the_same_step_if_known_early(known_at):
    table = table_of("t0", "t1", "t2", slots=2, to_come=1)
    report(table, "t0", at=25)
    table.next_report()
    table.line.clock = known_at
    assert table.gone(Roster(2, ("t1", "t2"), 1)) == ["t0"]
    table.drop("t0")
    table.gone(Roster(3, ("t1", "t2", "t3"), 0))
    sit(table, "t3", version=3)
    assert table.next_report() is None
    if known_at < 30:
        assert changes(table) == ([], [])
        assert table.next_stop() == 30
        table.line.clock = 30
    assert changes(table) == (["t0"], ["t2"])
    assert sorted(table.line.residents) == ["t1", "t2"]


def test_what_a_stopped_trial_still_trains_is_discarded():
    table = table_of("t0", "t1", slots=2)
    report(table, "t0", at=25)
    table.next_report()
    assert num_busy(table) == 2
    table.gone(Roster(2, ("t1",), 0))
    table.drop("t0")
    assert len(table.line.residents) == 2
    assert num_busy(table) == 1
    assert report(table, "t0", at=28, status="completed") == ["t0"]
    assert table.next_report() is None
    table.line.clock = 30
    assert changes(table) == ([], [])  # it has left by itself


@pytest.mark.parametrize("order", [("reported", "stopped"), ("stopped", "reported")])
def test_a_slot_freed_while_a_stop_is_decided_is_filled_at_that_step(order):
    table = table_of("t0", "t1", "t2", slots=2)
    report(table, "t0", at=25)
    table.next_report()
    for what in order:
        if what == "stopped":
            table.gone(Roster(2, ("t1", "t2"), 0))
            table.drop("t0")
        else:
            report(table, "t0", at=28, status="completed")
    assert changes(table) == ([], ["t2"])
    assert table.line.clock == 28


def test_a_trial_at_its_full_budget_frees_its_slot_for_the_queued_one():
    table = table_of("t0", "t1", "t2", slots=2)
    assert report(table, "t0", at=25, status="completed") == ["t0"]
    assert changes(table) == ([], ["t2"])


@pytest.mark.parametrize(("num_slots", "num_waiting"), [(1, 1), (3, 1), (4, 2), (8, 4)])
def test_half_as_many_trials_wait_as_there_are_slots_but_at_least_one(num_slots, num_waiting):
    names = [f"t{n:02d}" for n in range(num_slots + num_waiting)]
    table = table_of(*names, slots=num_slots, to_come=5)
    assert table.join("t99", CONFIG, None, 1, 0) == "full"
    report(table, *names[:num_waiting], at=25, status="completed")
    assert changes(table) == ([], names[num_slots:])


def test_one_trial_waits_at_each_of_several_workers():
    assert num_seats(8, strict=False) == 9  # the next may go elsewhere


def test_a_trial_seated_while_a_decision_is_awaited_joins_when_it_takes_effect():
    table = table_of("t0", "t1", "t2", slots=2, to_come=1)
    report(table, "t0", at=25, status="completed")
    assert changes(table) == ([], ["t2"])
    deal(table, "t0", ("t1", "t2", "t3"), sits="t3")
    report(table, "t1", at=27, status="completed")
    deal(table, "t1", ("t2", "t3"))
    assert table.can_train()
    assert changes(table) == ([], [])
    table.line.clock = 30
    assert changes(table) == ([], ["t3"])


@pytest.mark.parametrize("first", ["dealt with", "queued"])
def test_a_second_slot_freed_at_one_step_is_filled_there_by_a_new_trial(first):
    table = table_of("t0", "t1", "t2", "t3", slots=3, to_come=4)
    report(table, "t2", at=24)
    if first == "dealt with":
        table.next_report()
        table.line.seats["t2"].asks = True
    report(table, "t0", "t1", at=25, status="completed")
    assert not table.can_train()  # t3 takes one slot; no trial is there for the other yet
    assert changes(table) == ([], [])
    if first == "queued":
        found = table.next_report()
        assert found is not None
        assert found.trial_id == "t2"
        assert not table.can_train()
        table.line.seats["t2"].asks = True
    deal(table, "t0", ("t1", "t2", "t3", "t4"), 3, sits="t4")
    assert changes(table) == ([], ["t3", "t4"])
    assert table.can_train()  # what follows from t1 takes effect later
    deal(table, "t1", ("t2", "t3", "t4", "t5"), 2, sits="t5")
    assert table.line.clock == 25
    assert table.next_stop() == 30


def test_the_pack_goes_on_when_ended_trials_have_no_successors():
    table = table_of("t0", "t1", "t2", slots=3, to_come=0)
    report(table, "t0", "t1", at=25, status="completed")
    assert not table.can_train()
    deal(table, "t0", ("t1", "t2"))
    assert not table.can_train()
    deal(table, "t1", ("t2",))
    assert table.can_train()


def test_an_empty_packs_clock_skips_to_where_the_decision_takes_effect():
    table = table_of("t0", "t1", slots=1, to_come=1)
    report(table, "t0", at=100, status="completed")
    assert changes(table) == ([], ["t1"])
    deal(table, "t0", ("t1", "t2"), sits="t2")
    report(table, "t1", at=102, status="completed")
    deal(table, "t1", ("t2",))
    assert changes(table) == ([], ["t2"])
    assert table.line.clock == 105


@pytest.mark.parametrize("decided", ["before", "after"])
def test_a_join_that_fails_does_not_change_the_successors_step(decided):
    table = table_of("t0", "t1", "t2", slots=2, to_come=1)
    second = table.line.seats["t2"]
    report(table, "t0", at=25, status="completed")
    if decided == "before":
        found = table.next_report()
        assert found is not None
        assert changes(table) == ([], ["t2"])
        table.gone(Roster(2, ("t1", "t2", "t3"), 0))
        table.drop("t0")
        sit(table, "t3", version=2)
        table.settled()
        assert table.refused(second, LACKING)
    else:
        assert changes(table) == ([], ["t2"])
        assert table.refused(second, LACKING)
        deal(table, "t0", ("t1", "t2", "t3"), sits="t3")
    assert table.can_train()
    table.line.clock = 29
    assert changes(table) == ([], [])
    table.line.clock = 30
    assert changes(table) == ([], ["t3"])


def test_with_several_workers_the_pack_waits_for_no_decision():
    table = table_of("t0", "t1", slots=2, strict=False)
    report(table, "t0", "t1", at=25)
    assert None not in [table.next_report(), table.next_report()]
    assert table.can_train()
    assert table.next_stop() is None
    table.line.clock = 26
    assert not table.must_interrupt()
    table.drop("t0")
    table.next_report()
    assert table.must_interrupt()
    assert changes(table) == (["t0"], [])


def test_a_trial_that_is_seated_again_leaves_its_slot_before_it_joins():
    table = table_of("t0", "t1", slots=2, strict=False)
    report(table, "t0", at=25)
    assert table.next_report() is not None
    sit(table, "t0")
    table.next_report()
    assert changes(table) == (["t0"], ["t0"])


def test_a_stopped_trial_that_ends_by_itself_is_forgotten():
    table = table_of("t0", "t1", slots=2)
    report(table, "t0", at=25)
    table.next_report()
    table.gone(Roster(2, ("t1",), 0))
    table.drop("t0")
    report(table, "t0", at=28, status="completed")
    table.settled()
    assert changes(table) == ([], [])
    assert table.next_stop() is None
    assert table.line.leaving == []  # else its checkpoint would stay in memory
