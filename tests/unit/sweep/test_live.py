import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from higgs_tune.sweep.board import Board
from higgs_tune.sweep.live import Display, render


class Screen(io.StringIO):
    """A terminal, as rich sees it."""

    def isatty(self):
        return True


def drawn(board, num_rows=100, width=140):
    console = Console(width=width, file=io.StringIO())
    console.print(render(board, num_rows))
    return console.file.getvalue()


@pytest.fixture
def crowd(record):
    """Thirty trials, the last three still live; t004 is the best of the five that were completed."""
    board = Board()
    board.num_slots = 2
    for number in range(30):
        trial_id = f"t{number:03d}"
        board.start(replace(record, trial_id=trial_id), 0, {})
        board.result(trial_id, {"step": 25, "val/text/nll": 3 - number / 100})
        if number < 27:
            board.end(trial_id, "completed" if number < 5 else "pruned", is_feasible=True)
    return board


def test_the_table_shows_the_settings_progress_and_losses_of_each_trial(record):
    board = Board()
    board.num_slots = 1
    board.base = {"val/text/nll": 8.281, "val/audio/nll_per_code": 5.03, "val/text/audio_gain": 0}
    board.start(record, 0, {})
    board.result("t000", {"step": 25, "val/text/nll": 2.345, "val/text/audio_gain": 0.25})
    text = drawn(board)
    for expected in ("base", "8.281", "5.030", "t000", "running", "1.0e-04", "off", "all_linear",
                     "25/150", "2.345", "0.250", "0/1 ended", "so far"):  # fmt: skip
        assert expected in text
    assert "best" not in text
    board.to_come = 3
    board.result("t000", {"step": 50, "val/text/nll": 2.1})
    board.result("t000", {"step": 75})
    board.end("t000", "completed", is_feasible=True)
    board.end("t001", "cancelled")  # before it has started
    assert "1/4 ended · best t000 2.100" in drawn(board)


def test_a_screen_too_small_for_all_shows_live_trials_the_best_and_the_state(crowd):
    lines = drawn(crowd, num_rows=5).splitlines()
    assert [line.split()[0] for line in lines] == [
        "trial", "t003", "t004", "t027", "t028", "t029", "and", "starting"
    ]  # fmt: skip
    assert lines[-2] == "and 25 more trials"
    assert "27/30 ended" in lines[-1]
    assert len(drawn(crowd).splitlines()) == 32


def test_a_narrow_terminal_breaks_no_row_and_cuts_no_figure(crowd):
    long = {"cross_attention": "text_to_audio", "target_set": "all_linear_and_head"}
    for row in crowd.rows.values():
        row.record = replace(row.record, config=row.record.config.model_copy(update=long))
    lines = drawn(crowd, num_rows=5, width=80).splitlines()
    assert len(lines) == 8
    assert lines[1].split()[:4] == ["t003", "completed", "16", "1.0e-04"]
    assert lines[1].split()[-4:] == ["25/150", "2.970", "–", "–"]
    assert len(drawn(crowd, num_rows=5, width=60).splitlines()) == 8


def test_the_table_is_cut_to_the_terminal_and_shown_whole_at_the_end(crowd, monkeypatch):
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen()
    display = Display(screen)
    display.board = crowd
    crowd.base = {"val/text/nll": 8.0}
    display.refresh(force=True)
    shown = screen.getvalue()
    assert "27/30 ended" in shown and "t029" in shown and "t010" not in shown
    assert shown.count("\n") < 20
    crowd.stage = "confirm"
    display.refresh()  # too soon
    assert screen.getvalue() == shown
    display.refresh(force=True)
    assert "confirm · 27/30 ended" in screen.getvalue()
    display.close()
    assert "t010" in screen.getvalue()


def test_a_sweep_that_ends_early_says_so(record):
    display = Display(stream := io.StringIO())
    display.board.start(record, 0, {})
    display.ending("interrupted by SIGINT")
    assert json.loads(stream.getvalue())["reason"] == "interrupted by SIGINT"
    assert drawn(display.board).splitlines()[-1].startswith("ending · 0/1 ended")


def test_a_terminal_shows_brackets_in_messages_as_they_are(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    display = Display(screen := Screen())
    display.note("results /data/[old]/quick")
    display.warn("worker-0 cannot load [/data/base/model.safetensors]")
    display.ending("the sweep ended with an error: pip install 'psycopg[binary]'")
    display.close()
    for expected in ("/data/[old]/quick", "[/data/base/model.safetensors]", "psycopg[binary]"):
        assert expected in screen.getvalue()


def test_without_trials_only_the_state_line_is_shown():
    (line,) = drawn(Board()).splitlines()
    assert line.startswith("starting")


def test_outside_a_terminal_each_event_is_one_json_line_at_once(tmp_path):
    stream = (tmp_path / "log").open("w+")
    display = Display(stream)
    display.event("result", trial="t000", step=25, best={"val/text/nll": float("inf")})
    display.refresh(force=True)
    display.close()
    line = json.loads((tmp_path / "log").read_text(), parse_constant=pytest.fail)
    assert line.pop("time") > 0
    assert line == {"event": "result", "trial": "t000", "step": 25, "best": {"val/text/nll": None}}
