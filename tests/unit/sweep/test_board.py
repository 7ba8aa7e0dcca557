from dataclasses import replace

import pytest

from higgs_tune.sweep.board import Board


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def board(now):
    board = Board(clock=lambda: now[0])
    board.num_slots = 2
    return board


def states(board):
    return {trial_id: row.state for trial_id, row in board.rows.items()}


def test_time_left_follows_from_the_pace_the_trials_and_the_next_stage(record, board, now):
    board.start(record, 0, {})
    now[0] = 30.0  # the worker loads
    board.begin()
    assert board.time_left_s() is None
    now[0] = 80.0
    board.begin()  # another worker
    board.result("t000", {"step": 50})
    board.to_come = 2
    assert board.time_left_s() == pytest.approx(100 + 2 * 150)
    board.steps_after = 600
    assert board.time_left_s() == pytest.approx(100 + 2 * 150 + 600)
    board.end("t000", "pruned")
    assert board.time_left_s() == pytest.approx(2 * 50 + 600)


def test_steps_before_a_resume_do_not_count_as_pace(record, board, now):
    board.start(record, 100, {"step": 100})
    board.begin()
    now[0] = 25.0
    board.result("t000", {"step": 125})
    assert board.time_left_s() == pytest.approx(25)


def test_a_sweep_ending_early_shows_no_time_left_and_counts_no_cancelled_trial(record, board, now):
    board.start(record, 0, {})
    board.begin()
    now[0] = 50.0
    board.result("t000", {"step": 50})
    board.is_ending = True
    board.end("t000", "cancelled")
    assert board.time_left_s() is None
    assert board.num_ended() == 0
    board.known(replace(record, trial_id="t001"), "pruned", {}, None)
    assert board.num_ended() == 1


def test_a_paused_trial_is_shown_as_paused_and_counts_in_the_time_left(record, board, now):
    board.start(record, 0, {})
    board.begin()
    now[0] = 50.0
    board.result("t000", {"step": 50})
    board.pause({"t000"})
    assert states(board) == {"t000": "paused"}
    assert board.time_left_s() == pytest.approx(100)
    board.pause(set())
    assert states(board) == {"t000": "running"}
    board.end("t000", "pruned")
    board.pause({"t000"})
    assert states(board) == {"t000": "pruned"}


def test_trials_without_a_slot_are_shown_as_waiting(record, board):
    for number in range(4):
        board.start(replace(record, trial_id=f"t00{number}"), 0, {})
    assert list(states(board).values()) == ["running", "running", "waiting", "waiting"]
    board.end("t000", "pruned")
    assert list(states(board).values()) == ["pruned", "running", "running", "waiting"]
    board.result("t003", {"step": 25})  # at another worker, where a slot was free sooner
    assert list(states(board).values()) == ["pruned", "running", "waiting", "running"]
    board.pause({"t001"})
    assert list(states(board).values()) == ["pruned", "paused", "running", "running"]
    board.start(replace(record, trial_id="t003"), 25, {})  # its worker died: it queues again
    assert list(states(board)) == ["t000", "t001", "t002", "t003"]
    assert states(board)["t003"] == "running"


def test_new_trials_take_slots_in_the_order_of_their_numbers(record, board):
    for number in (0, 3, 1, 2):
        board.start(replace(record, trial_id=f"t{number:03d}", number=number), 0, {})
    waiting = {"t002": "waiting", "t003": "waiting"}
    assert states(board) == {"t000": "running", "t001": "running"} | waiting
    goes_on = replace(record, trial_id="t004", number=4)
    board.end("t000", "pruned")
    board.start(goes_on, 50, {})  # behind the trials that wait already
    assert states(board) == {
        "t000": "pruned", "t001": "running", "t002": "running", "t003": "waiting", "t004": "waiting",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "is_feasible", "confirms"),
    [("pruned", True, None), ("completed", False, None), ("completed", None, None),
     ("completed", True, "t000")],
)  # fmt: skip
def test_the_best_is_a_completed_trial_of_the_search_within_the_audio_limit(
    record, board, status, is_feasible, confirms
):
    board.known(replace(record, trial_id="t001"), "completed", {"val/text/nll": 3.0}, True)
    board.known(replace(record, trial_id="t002"), "completed", {"val/text/nll": 2.0}, True)
    other = replace(record, trial_id="x", confirms=confirms)
    board.known(other, status, {"val/text/nll": 1.0}, is_feasible)
    assert board.best() is board.rows["t002"]


def test_a_live_trial_without_a_process_counts_as_to_come(record, board):
    board.expect(5, num_live=3)
    assert board.to_come == 8
    board.start(record, 0, {})
    board.expect(5, num_live=3)
    assert board.to_come == 7
    board.end("t000", "pruned")
    board.expect(4, num_live=3)
    assert board.to_come == 7
