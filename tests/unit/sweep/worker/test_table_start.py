"""The start of a stage: the pack begins with full slots, and the trials that will wait come later."""

import pytest

from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.table import Table
from tests.unit.sweep.worker.test_table import LACKING, changes, report, sit, table_of


def first_two(room: int | None = 2) -> Table:
    """A table of two slots in which the first two trials train; the third will wait for a slot."""
    table = Table(2, strict=True, ahead=5)
    table.gone(Roster(1, ("t0", "t1"), 2, room))
    sit(table, "t0")
    assert changes(table) == ([], [])
    sit(table, "t1")
    assert table.next_report() is None
    assert changes(table) == ([], ["t0", "t1"])
    return table


def test_the_pack_begins_with_full_slots_before_the_waiting_trials_come():
    table = first_two()
    table.line.clock = 3
    assert table.can_train()
    table.gone(Roster(2, ("t0", "t1", "t2"), 1, 3))
    assert not table.must_interrupt()
    table.line.clock = 7
    sit(table, "t2", version=2)
    assert table.next_report() is None
    assert table.can_train()
    assert table.line.seats["t2"].since == 0  # whenever its process came
    assert not table.must_interrupt()


def test_no_report_goes_out_before_the_waiting_trials_are_named():
    table = first_two()
    report(table, "t0", at=25)
    assert table.next_report() is None
    assert not table.can_train()
    table.gone(Roster(2, ("t0", "t1", "t2"), 1, 3))
    found = table.next_report()
    assert found is not None
    assert found.trial_id == "t0"
    assert table.can_train()  # t2's process may take seconds to come, and no slot is free
    assert table.next_stop() == 30
    sit(table, "t2", version=2)
    assert table.next_report() is None
    assert table.line.seats["t2"].since == 0


def test_a_slot_freed_before_the_waiting_trials_have_come_waits_for_them():
    table = first_two()
    report(table, "t1", at=4, status="diverged")
    assert changes(table) == ([], [])
    table.gone(Roster(2, ("t0", "t1", "t2"), 1, 3))
    assert changes(table) == ([], [])
    assert not table.can_train()
    sit(table, "t2", version=2)
    assert table.next_report() is not None
    assert changes(table) == ([], ["t2"])
    assert table.can_train()


def test_a_slot_without_memory_for_its_first_trial_is_filled_before_the_first_step():
    table = Table(2, strict=True, ahead=5)
    table.gone(Roster(1, ("t0", "t1"), 2, 2))
    for name in ("t0", "t1"):
        sit(table, name)
    table.next_report()
    _, (_, second) = table.take_changes()
    assert table.refused(second, LACKING)
    assert not table.can_train()  # else timing would decide after which step t2 joins
    table.gone(Roster(2, ("t0", "t1", "t2"), 1, 3))
    sit(table, "t2", version=2)
    table.next_report()
    assert changes(table) == ([], ["t2"])
    assert table.line.clock == 0
    assert table.can_train()


def test_without_further_trials_a_report_goes_out_at_once():
    table = table_of("t0", "t1", slots=2)
    table.gone(Roster(2, ("t0", "t1"), 0, 2))
    report(table, "t0", at=25)
    assert table.next_report() is not None


@pytest.mark.parametrize("named", ["before its report", "after its report"])
def test_a_pack_that_empties_before_waiting_trials_are_named_keeps_its_step(named):
    table = Table(1, strict=True, ahead=5)
    table.gone(Roster(1, ("t0",), 1, room=1))  # one process while the base loads
    sit(table, "t0")
    table.next_report()
    assert changes(table) == ([], ["t0"])

    def name() -> None:
        table.gone(Roster(2, ("t0", "t1"), 0, room=2))
        sit(table, "t1", version=2)
        table.settled()

    if named == "before its report":
        name()
    report(table, "t0", at=25, status="completed")
    if named == "after its report":
        assert changes(table) == ([], [])
        name()
    joined = changes(table)
    assert (joined, table.line.clock) == (([], ["t1"]), 25)
