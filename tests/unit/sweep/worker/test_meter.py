import pytest

from higgs_tune.sweep.worker.meter import KINDS, Meter


def trained(train_s: float, **more: float) -> dict[str, float]:
    return {"train_s": train_s, "validate_s": 0.0, **more}


def test_time_counts_from_the_first_step_to_the_last():
    meter = Meter()
    meter.add({"wait_s": 50.0}, busy=0, wanted=2)
    meter.add(trained(8.0, other_s=1.0), busy=2, wanted=2)
    meter.add({"wait_s": 3.0}, busy=1, wanted=2)
    meter.add(trained(4.0), busy=1, wanted=1)
    meter.add({"idle_s": 70.0}, busy=0, wanted=0)
    figures = meter.figures()
    assert figures["wall_s"] == 16.0
    assert {kind: figures[kind] for kind in KINDS if figures[kind]} == {
        "train_s": 12.0, "wait_s": 3.0, "other_s": 1.0
    }  # fmt: skip
    assert figures["occupancy"] == pytest.approx((2 * 9 + 4) / (2 * 9 + 2 * 3 + 4), abs=1e-4)


def test_refill_time_counts_only_while_a_trial_could_fill_the_slot():
    meter = Meter()
    meter.add(trained(8.0, save_s=0.1), busy=2, wanted=2)
    meter.freed(1)
    meter.add({"wait_s": 0.3}, busy=1, wanted=2)
    meter.add(trained(2.0), busy=1, wanted=2)  # its neighbour goes on
    meter.add(trained(9.0), busy=1, wanted=1)  # no trial waits or is to come
    meter.add({"join_s": 0.2}, busy=1, wanted=2)
    meter.filled(2)  # the second slot was free from the start
    assert meter.figures()["num_refills"] == 1
    assert meter.figures()["refill_max_s"] == pytest.approx(2.5)


def test_a_slot_that_no_trial_wants_is_not_counted_as_refilled():
    meter = Meter()
    meter.add(trained(8.0), busy=1, wanted=1)
    meter.freed(1)
    meter.add({"idle_s": 60.0}, busy=0, wanted=0)
    meter.filled(1)
    assert meter.figures()["num_refills"] == 0
    assert meter.figures()["refill_max_s"] is None
