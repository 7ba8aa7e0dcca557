"""Which trial gets a seat, and which is next when a slot is free."""

from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.occupancy import num_busy, num_wanted
from tests.unit.sweep.worker.test_table import CONFIG, LACKING, changes, report, sit, table_of


def test_the_seat_of_a_trial_that_has_ended_is_free():
    table = table_of("t0", "t1", "t2", slots=2)
    assert table.join("t3", CONFIG, None, 1, 0) == "full"
    report(table, "t0", at=100, status="completed")
    assert table.join("t3", CONFIG, None, 1, 0) == "seated"


def test_the_trial_that_has_waited_longest_gets_the_slot():
    names = ("t0", "t1", "t2", "t3", "t9")
    table = table_of(*names, slots=4)
    report(table, "t0", at=25)
    table.next_report()
    table.gone(Roster(2, (*names, "t4"), 0))
    sit(table, "t4", version=2)
    table.line.seats["t0"].asks = True
    assert table.settled()
    table.line.clock = 30
    assert changes(table) == ([], [])
    report(table, "t1", at=100, status="completed")
    assert changes(table) == ([], ["t9"])


def test_a_slot_closed_for_lack_of_memory_is_not_wanted_by_a_trial_to_come():
    table = table_of("t0", "t1", "t2", slots=3)
    assert table.refused(table.line.seats["t2"], LACKING)
    table.gone(Roster(2, ("t0", "t1", "t2"), 1))
    assert num_wanted(table) == num_busy(table) == 2
