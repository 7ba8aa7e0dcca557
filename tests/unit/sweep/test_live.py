import io
import json

import pytest
from rich.console import Console

from higgs_tune.sweep import space
from higgs_tune.sweep.live import Board, Display, render
from higgs_tune.sweep.study import TrialRecord


@pytest.fixture
def record(make_config):
    config = make_config()
    trial = space.resolve(space.baseline_values(config, fixed_flag=False), config, 5)
    return TrialRecord("t000", 0, space.short_name("t000", trial), "baseline", None, trial)


def test_time_left_follows_the_pace_and_the_trials_to_come(record):
    now = [0.0]
    board = Board(clock=lambda: now[0])
    board.start(record, 0)
    assert board.time_left_s() is None
    now[0] = 50.0
    board.result("t000", {"step": 50})
    board.to_come = 2
    assert board.time_left_s() == pytest.approx(100 + 2 * 150)
    board.end("t000", "pruned")
    assert board.time_left_s() == pytest.approx(2 * 50)


def test_steps_before_a_resume_do_not_count_as_pace(record):
    now = [0.0]
    board = Board(clock=lambda: now[0])
    board.start(record, 100)
    now[0] = 25.0
    board.result("t000", {"step": 125})
    assert board.time_left_s() == pytest.approx(25)


def test_a_paused_trial_is_shown_as_such_and_still_to_be_finished(record):
    now = [0.0]
    board = Board(clock=lambda: now[0])
    board.start(record, 0)
    now[0] = 50.0
    board.result("t000", {"step": 50})
    board.pause({"t000"})
    assert board.rows["t000"].state == "paused"
    assert board.time_left_s() == pytest.approx(100)
    board.pause(set())
    assert board.rows["t000"].state == "running"
    board.end("t000", "pruned")
    board.pause({"t000"})
    assert board.rows["t000"].state == "pruned"


def test_the_table_shows_what_a_person_asks_for(record):
    board = Board()
    board.start(record, 0)
    board.result("t000", {"step": 25, "val/text/nll": 2.345, "val/text/audio_gain": 0.25})
    console = Console(width=140, file=io.StringIO())
    console.print(render(board))
    text = console.file.getvalue()
    for expected in ("t000", "running", "1.0e-04", "off", "all_linear", "25/150", "2.345", "0.250"):
        assert expected in text


def test_outside_a_terminal_each_event_is_one_json_line():
    stream = io.StringIO()
    display = Display(stream)
    display.event("result", trial="t000", step=25, best={"val/text/nll": float("inf")})
    display.refresh(force=True)
    display.close()
    line = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert line.pop("time") > 0
    assert line == {"event": "result", "trial": "t000", "step": 25, "best": {"val/text/nll": None}}
