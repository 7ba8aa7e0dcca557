"""A new trial trains as soon as it is named: only its first report needs its process."""

import pytest

from higgs_tune.config import TrialConfig
from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.table import Table
from tests.unit.sweep.worker.test_table import CONFIG, changes, report, sit, table_of


def name(table: Table, *live: str, to_come: int = 0, room: int | None = None) -> None:
    """Let the driver name these live trials; those without a seat are new."""
    new = dict.fromkeys(set(live) - table.line.seats.keys(), CONFIG)
    for gone in table.gone(Roster(table.roster.version + 1, live, to_come, room, new)):
        table.drop(gone)
    table.seat_new()


def begun() -> Table:
    """Two new trials train; no process has come, and a third trial waits for a slot."""
    table = Table(2, strict=True, ahead=5)
    name(table, "t0", to_come=2, room=2)
    assert not table.settled()
    assert changes(table) == ([], [])  # another is to be named
    name(table, "t0", "t1", to_come=1, room=2)
    table.next_report()
    assert changes(table) == ([], ["t0", "t1"])
    name(table, "t0", "t1", "t2", to_come=0, room=3)
    assert table.next_report() is None
    return table


def test_the_pack_begins_before_any_process_has_come():
    table = begun()
    assert table.can_train()
    assert table.line.seats["t2"].since == 0
    assert table.missing() == set()
    assert table.quiet() == {"t0", "t1", "t2"}


def test_a_process_that_comes_later_takes_over_its_trial_as_it_is():
    table = begun()
    seat = table.line.seats["t0"]
    report(table, "t0", at=25)
    assert table.next_report() is None  # its process has not asked
    sit(table, "t0")
    assert table.line.seats["t0"] is seat
    found = table.next_report()
    assert found is not None
    assert (found.trial_id, found.result["step"]) == ("t0", 25)


def test_a_second_process_before_the_first_report_loses_nothing_either():
    table = begun()
    sit(table, "t0")
    seat = table.line.seats["t0"]
    assert table.join("t0", CONFIG, None, 3, 1) == "seated"
    assert table.line.seats["t0"] is seat
    assert not seat.asks


@pytest.mark.parametrize("differs", ["reported", "config", "checkpoint"])
def test_a_process_that_would_begin_differently_starts_its_trial_again(differs):
    table = begun()
    seat = table.line.seats["t0"]
    if differs == "reported":
        sit(table, "t0")
        report(table, "t0", at=25)
        assert table.next_report() is not None
    config = CONFIG.model_copy(update={"seed": 7}) if differs == "config" else CONFIG
    files = {} if differs == "checkpoint" else None
    assert table.join("t0", config, files, 3, 1) == "seated"
    assert table.line.seats["t0"] is not seat
    assert table.line.leaving == [(seat, None)]


def test_reports_go_out_in_their_order_whichever_process_comes_first():
    table = begun()
    report(table, "t0", "t1", at=25)
    sit(table, "t1")
    assert table.next_report() is None
    sit(table, "t0")
    found = table.next_report()
    assert found is not None
    assert found.trial_id == "t0"


def test_the_pack_waits_where_a_report_that_no_process_has_taken_takes_effect():
    table = begun()
    report(table, "t0", at=25)
    assert table.next_report() is None
    assert table.next_stop() == 30
    table.line.clock = 30
    assert not table.can_train()


def test_a_freed_slot_is_filled_when_its_trial_is_named():
    table = table_of("t0", "t1", slots=2)
    report(table, "t0", at=100, status="completed")
    assert table.next_report() is not None
    name(table, "t1", to_come=1)
    assert not table.can_train()
    name(table, "t1", "t2")
    table.next_report()
    assert changes(table) == ([], ["t2"])
    assert table.can_train()


def test_a_trial_that_was_too_late_is_seated_only_by_its_process():
    table = begun()
    table.drop("t1")
    table.line.expected.give_up(["t1"])
    table.seat_new()
    assert "t1" not in table.line.seats
    sit(table, "t1", version=3)
    assert "t1" in table.line.seats


def test_a_trial_begins_from_a_checkpoint_that_is_restored_later():
    table = begun()
    table.restore("t0", {})
    assert table.line.seats["t0"].files == {}
    table.next_report()
    assert table.line.seats["t0"].since is None  # until it asks: Tune may send another


def test_with_several_workers_a_trial_is_not_seated_before_its_process_comes():
    table = table_of("t0", slots=2, strict=False)
    name(table, "t0", "t1")
    assert set(table.line.seats) == {"t0"}


def test_a_trial_that_is_not_live_gets_no_seat():
    table = Table(2, strict=True, ahead=5)
    new: dict[str, TrialConfig] = {"t9": CONFIG}
    table.gone(Roster(1, ("t0",), 0, None, new))
    table.seat_new()
    assert not table.line.seats
