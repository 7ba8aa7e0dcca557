"""What a training run shows, in a terminal and elsewhere."""

import io
import json

import pytest

from higgs_tune.train.display import Display, Pace
from higgs_tune.train.samples import Sample

LINE = {
    "step": 5,
    "epoch": 1.254,
    "val/text/nll": 2.5,
    "val/audio/nll_per_code": 4.0,
    "status": "running",
}
SAMPLES = [
    Sample("a:transcribe", "نعم [b]", "نعم", True),
    Sample("b:transcribe", "no", "nono", False),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    with Display(20, stream) as display:
        display.step(5)
        display.line(LINE)
        display.samples(SAMPLES)
        display.line({**LINE, "step": 20, "status": "completed", "reason": "early stop: enough"})
    return stream.getvalue()


def test_without_a_terminal_only_json_lines_are_printed():
    lines = [json.loads(line) for line in shown(io.StringIO()).splitlines()]
    assert [line["step"] for line in lines] == [5, 20]
    assert lines[0] == LINE


def test_a_display_without_calls_shows_nothing():
    stream = Terminal()
    with Display(20, stream):  # as in all processes but the main one
        pass
    assert stream.getvalue() == ""


def test_a_figure_that_is_nan_is_null_in_json():
    stream = io.StringIO()
    Display(20, stream).line({**LINE, "val/text/nll": float("nan")})
    assert json.loads(stream.getvalue(), parse_constant=pytest.fail)["val/text/nll"] is None


def test_a_terminal_shows_figures_and_samples_verbatim(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = shown(Terminal())
    assert "step  5/20   epoch 1.25   text 2.500   audio 4.000" in text
    assert "completed early stop: enough" in text
    assert "نعم [b]" in text
    assert "nono …" in text


def test_a_terminal_names_the_adapter_that_a_run_started_from():
    stream = Terminal()
    with Display(20, stream) as display:
        display.line({**LINE, "step": 0, "epoch": 0.0, "start_from": "old/adapter"})
    line = "step  0/20   epoch 0.00   text 2.500   audio 4.000   started from old/adapter"
    assert line in stream.getvalue()


def test_pace_counts_only_the_steps_since_this_start():
    now = iter([0.0, 10.0, 10.0, 20.0, 20.0])
    pace = Pace(1000, clock=lambda: next(now))
    assert pace.after(500) == ""
    assert pace.after(540) == "4.00 steps/s · 1 min 55 s left"
