"""File work on a thread beside Tune's loop."""

import threading

import pytest

from higgs_tune.sweep.later import Later


def test_work_is_done_in_order_and_each_trials_work_can_be_waited_for():
    later, start, done = Later(), threading.Event(), []
    later.do("t0", lambda: start.wait(30))
    later.do("t1", lambda: done.append("t1"))
    later.wait("t2")  # it has no work
    assert done == []
    threading.Timer(0.1, start.set).start()
    later.do("t1", lambda: done.append("t1 again"))  # waits for the trial's earlier work
    assert done[0] == "t1"
    later.wait("t1")
    assert done == ["t1", "t1 again"]


def test_an_error_is_raised_once_and_other_work_is_still_done():
    def full():
        raise OSError("No space left on device")

    later, done = Later(), []
    later.do("t0", full)
    later.do("t1", lambda: done.append("t1"))
    later.wait("t0")
    later.wait("t1")
    assert done == ["t1"]
    with pytest.raises(OSError, match="No space left"):
        later.check()
    later.check()
    later.do("t0", full)
    with pytest.raises(OSError, match="No space left"):
        later.finish()
