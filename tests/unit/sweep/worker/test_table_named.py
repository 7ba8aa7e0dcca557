"""A report's consequences are known once a successor is named; the successor's process comes later."""

from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.occupancy import num_unfinished, num_wanted
from higgs_tune.sweep.worker.table import Table
from tests.unit.sweep.worker.test_table import CONFIG, LACKING, changes, report, sit, table_of

SIX = ("t0", "t1", "t2", "t3", "t4", "t5")


def four_have_ended() -> Table:
    """All four slots are free, two trials wait, and five are to come."""
    table = table_of(*SIX, slots=4, to_come=5)
    report(table, "t0", "t1", "t2", "t3", at=25, status="completed")
    return table


def follow(table: Table, name: str, successor: str) -> None:
    """Let the driver hear that a trial ended, and name its successor."""
    found = table.next_report()
    assert found is not None
    assert found.trial_id == name
    live = [other for other in table.roster.live if other != name]
    for names, to_come in ((live, 0), ([*live, successor], -1)):
        roster = Roster(table.roster.version + 1, tuple(names), table.roster.to_come + to_come)
        for gone in table.gone(roster):
            table.drop(gone)
        if successor not in names:
            assert table.next_report() is None


def test_a_report_goes_out_once_the_former_ones_successor_is_named():
    table = four_have_ended()
    follow(table, "t0", "t6")
    follow(table, "t1", "t7")
    table.settled()
    assert changes(table) == ([], [])  # two slots wait for processes
    sit(table, "t7", version=5)
    table.settled()
    assert not table.can_train()
    sit(table, "t6", version=5)
    table.settled()
    assert [table.line.seats[name].since for name in ("t6", "t7")] == [25, 25]
    assert changes(table) == ([], ["t4", "t5", "t6", "t7"])
    assert table.can_train()


def test_a_successor_may_train_from_the_same_step_however_late_it_comes():
    table = table_of("t0", "t1", "t2", slots=2, to_come=3)
    table.gone(Roster(2, ("t0", "t1", "t2"), 3, 3))
    report(table, "t0", at=25)
    report(table, "t1", at=27)
    table.next_report()
    table.gone(Roster(3, ("t1", "t2"), 3, 3))  # t0 was stopped
    table.drop("t0")
    table.gone(Roster(4, ("t1", "t2", "t3"), 2, 3))
    found = table.next_report()
    assert found is not None and found.trial_id == "t1"
    assert table.next_stop() == 30
    table.line.clock = 30
    assert changes(table) == (["t0"], ["t2"])  # t2 waited; t3 is not needed yet
    assert table.can_train()
    table.line.seats["t1"].asks = True
    table.settled()
    table.line.clock = 31
    assert table.can_train()
    sit(table, "t3", version=4)
    table.settled()
    assert table.line.seats["t3"].since == 30


def test_a_pack_that_waits_for_a_process_sends_no_report_that_can_wait():
    table = four_have_ended()
    follow(table, "t0", "t6")
    follow(table, "t1", "t7")
    assert table.next_report() is None  # t2's would take effect only at step 30
    for name in ("t6", "t7"):
        sit(table, name, version=5)
    found = table.next_report()
    assert found is not None
    assert found.trial_id == "t2"


def test_the_pack_goes_on_without_a_trial_that_is_too_late_or_cancelled():
    table = four_have_ended()
    follow(table, "t0", "t6")
    follow(table, "t1", "t7")
    table.settled()
    table.line.expected.give_up(["t6"])
    assert changes(table) == ([], [])
    table.gone(Roster(6, ("t2", "t3", "t4", "t5", "t6"), 0))  # t7 was cancelled
    table.settled()
    assert changes(table) == ([], ["t4", "t5"])
    assert table.can_train()
    sit(table, "t6", version=6)
    table.settled()
    assert changes(table) == ([], ["t6"])


def test_a_slot_that_waits_for_a_process_counts_as_wanted():
    table = table_of("t0", "t1", slots=2)
    report(table, "t0", "t1", at=100, status="completed")
    for names in (("t0",), ("t0", "t2")):
        for gone in table.gone(Roster(table.roster.version + 1, names, 0)):
            table.drop(gone)
    assert num_wanted(table) == num_unfinished(table) == 1


def test_with_several_workers_trials_queue_in_the_order_in_which_they_ask():
    table = table_of("t0", "t1", "t2", slots=2, strict=False)
    table.gone(Roster(2, ("t0", "t3", "t4"), 0))
    for name in ("t1", "t2"):
        table.drop(name)
    for clock, joins, asks in ((3, "t3", ""), (5, "t4", "t4"), (7, "", "t3")):
        table.line.clock = clock
        if joins:
            assert table.join(joins, CONFIG, None, 2, 1) == "seated"
        if asks:
            table.line.seats[asks].asks = True
        table.settled()
    assert [table.line.seats[name].since for name in ("t4", "t3")] == [5, 7]


def test_a_process_is_not_awaited_if_a_trial_that_lacked_memory_gets_its_slot():
    table = table_of("t0", "t1", "t2", slots=3)
    assert table.refused(table.line.seats["t2"], LACKING)
    report(table, "t0", at=25)
    table.next_report()
    table.gone(Roster(2, ("t1", "t2"), 2))
    table.drop("t0")
    table.gone(Roster(3, ("t1", "t2", "t3", "t4"), 0))
    sit(table, "t3", version=3)
    table.settled()
    table.line.clock = 30  # two slots for t2, t3 and t4, whose process is to come
    assert changes(table) == (["t0"], ["t2", "t3"])
    assert table.can_train()
