"""Trials that find no memory when they are to join the pack."""

import pytest

from higgs_tune.sweep.seats import Roster
from higgs_tune.sweep.worker.occupancy import num_busy, num_wanted
from tests.unit.sweep.worker.test_table import LACKING, changes, deal, report, table_of


@pytest.mark.parametrize("leaves", ["ends", "stopped"])
def test_a_trial_that_finds_no_memory_waits_until_another_leaves(leaves):
    table = table_of("t0", "t1", "t2", slots=3)
    assert table.refused(table.line.seats["t2"], LACKING)
    assert num_wanted(table) == num_busy(table) == 2  # memory closes the third slot
    assert table.can_train()
    assert not table.must_interrupt()
    assert changes(table) == ([], [])
    if leaves == "ends":
        report(table, "t0", at=25, status="completed")
        deal(table, "t0", ("t1", "t2"))
        assert changes(table) == ([], ["t2"])
    else:
        report(table, "t0", at=25)
        assert table.next_report() is not None
        table.drop("t0")
        table.gone(Roster(2, ("t1", "t2"), 0))
        assert table.next_report() is None
        table.line.clock = 30
        assert changes(table) == (["t0"], ["t2"])
    assert not table.line.seats["t2"].reports


def test_a_trial_that_finds_no_memory_leaves_the_slot_to_a_smaller_one():
    table = table_of("t0", "t1", "t2", slots=2)
    assert table.refused(table.line.seats["t1"], LACKING)
    assert changes(table) == ([], ["t2"])
    assert not table.refused(table.line.seats["t2"], LACKING | {"status": "failed"})
    deal(table, "t2", ("t0", "t1"))
    assert changes(table) == ([], ["t1"])  # t2's memory is free


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_trial_that_finds_no_memory_alone_in_the_pack_ends(status):
    table = table_of("t0", "t1", slots=2)
    first, second = table.line.seats["t0"], table.line.seats["t1"]
    assert table.refused(first, LACKING)  # `second` joins with it
    assert not table.refused(second, LACKING | {"status": status})
    assert second.ended
    deal(table, "t1", ("t0",))
    assert changes(table) == ([], ["t0"])  # now with the pack to itself
    assert not table.refused(first, LACKING)
    assert first.ended
    assert first.reports[0].result == LACKING


def test_a_trial_stopped_while_its_join_finds_no_memory_is_forgotten():
    table = table_of("t0", "t1", slots=2)
    seat = table.line.residents["t1"]
    table.drop("t1")
    table.refused(seat, LACKING)
    table.gone(Roster(2, ("t0",), 0))
    table.settled()
    assert changes(table) == ([], [])
    assert table.line.leaving == []
