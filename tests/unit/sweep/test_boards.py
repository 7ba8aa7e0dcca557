"""What TensorBoard shows of a sweep's trials."""

import json
import subprocess
import sys
import time

import pytest
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from higgs_tune.sweep.boards import BOARDS, Boards
from higgs_tune.sweep.study import TrialRecord
from tests.boards import count, events, plugin_data
from tests.workers import trial

SEARCHED = ("rank", "learning_rate", "cross_attention")


def record(trial_id, **changes):
    return TrialRecord(trial_id, 0, trial_id, "search", None, trial(**changes))


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """Gives a trial these metrics lines; returns the text losses that its board shows, by step."""
    monkeypatch.setattr("higgs_tune.train.board.FLUSH_S", 0.02)
    boards = Boards(tmp_path, SEARCHED)

    def show(of, lines, boards=boards):
        folder = tmp_path / "trials" / of.trial_id
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(
            json.dumps({"step": step, "val/text/nll": nll}) + "\n" for step, nll in lines
        )
        (folder / "metrics.jsonl").write_text(text)
        boards.update(of)
        boards.finish()
        expected = {step: nll for step, nll in lines if nll is not None}
        end = time.monotonic() + 10
        while True:
            found = events(tmp_path / BOARDS / of.trial_id).get("val/text/nll", {})
            if found == expected or time.monotonic() > end:
                return found
            time.sleep(0.02)

    return show


def test_a_board_has_each_report_of_its_own_trial_once(shown, tmp_path):
    assert shown(record("t000"), [(25, 4.0)]) == {25: 4.0}
    assert shown(record("t001"), [(25, 3.0)]) == {25: 3.0}
    for lines in ([(25, 4.0), (50, 2.0)], [(25, 4.0), (50, 2.0), (75, 1.0)]):
        assert shown(record("t000"), lines) == dict(lines)
        assert count(tmp_path / BOARDS / "t000", "val/text/nll") == len(lines)


def test_a_value_that_is_not_finite_is_not_drawn(shown):
    assert shown(record("t000"), [(25, 4.0), (50, None)]) == {25: 4.0}


def test_a_trial_that_continues_from_its_checkpoint_shows_its_new_values(shown):
    shown(record("t000"), [(25, 4.0), (50, 3.0)])
    assert shown(record("t000"), [(25, 4.0), (50, 2.5)]) == {25: 4.0, 50: 2.5}
    assert shown(record("t000"), [(25, 4.0)]) == {25: 4.0}


def test_a_resumed_sweeps_board_has_the_whole_history(shown, tmp_path):
    shown(record("t000"), [(25, 4.0)])
    found = shown(record("t000"), [(25, 4.0), (50, 2.0)], boards=Boards(tmp_path, SEARCHED))
    assert found == {25: 4.0, 50: 2.0}


def test_a_trial_that_continues_after_its_end_shows_its_whole_history(shown, tmp_path):
    boards = Boards(tmp_path, SEARCHED)
    shown(record("t000"), [(25, 4.0)], boards)
    boards.end("t000")
    boards.end("t000")  # its board is closed already
    assert shown(record("t000"), [(25, 4.0), (50, 2.0)], boards) == {25: 4.0, 50: 2.0}


def test_a_board_names_the_trials_settings_and_results(shown, tmp_path):
    shown(record("t000", rank=16, learning_rate=3e-4), [(25, 4.0)])
    found = plugin_data(tmp_path / BOARDS / "t000", "hparams")
    start = HParamsPluginData.FromString(found["_hparams_/session_start_info"])
    settings = start.session_start_info.hparams
    assert settings["rank"].number_value == 16
    assert settings["learning_rate"].number_value == 3e-4
    assert settings["cross_attention"].string_value == "off"
    assert set(settings) == set(SEARCHED)
    experiment = HParamsPluginData.FromString(found["_hparams_/experiment"]).experiment
    names = [metric.name.tag for metric in experiment.metric_infos]
    assert names == ["val/text/nll", "val/text/audio_gain", "val/audio/nll_per_code"]


def test_a_board_that_cannot_be_written_raises_one_error(tmp_path):
    (tmp_path / BOARDS).write_text("in the way")
    boards = Boards(tmp_path, SEARCHED)
    boards.update(record("t000"))
    with pytest.raises(OSError, match="Not a directory"):
        boards.finish()
    boards.check()  # raised once


def test_importing_the_driver_does_not_import_torch():
    code = "import sys, higgs_tune.sweep.driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
