"""A trial whose worker dies too often is given up: it has no result, and a resumed sweep continues it."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from higgs_tune.report.build import build_report
from tests.integration.test_sweep import run, study_of, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def kill_worker_when(folder: Path, pattern: str) -> None:
    """Kill the newest worker as soon as a file matches; its trials are given up at once."""

    def kill_once() -> None:
        while not list(folder.glob(pattern)):
            time.sleep(0.05)
        os.kill(int((folder / "pids").read_text().splitlines()[-1]), signal.SIGKILL)

    threading.Thread(target=kill_once, daemon=True).start()


def sections_of(folder: Path) -> dict[str, Any]:
    return {
        "base": {"path": f"pid:{folder / 'pids'}"},
        "tune": {
            "num_trials": 3,
            "max_failures": 0,
            "slots_per_worker": 1,
            "scheduler": {"name": "none"},
        },
        "confirm": {"num_configs": 1, "num_seeds": 1},
    }


def test_a_resumed_search_continues_the_trials_that_were_given_up(tmp_path):
    sections = sections_of(tmp_path) | {"confirm": {"num_configs": 0}}
    kill_worker_when(tmp_path, "s/trials/t000/adapter")
    outcome = run(tmp_path, **sections)
    ended = {name: trial["status"] for name, trial in trials_of(outcome.results).items()}
    lost = {name for name, status in ended.items() if status["status"] != "completed"}
    assert "t000" in lost
    told = {f"t{trial.user_attrs['index']:03d}": trial for trial in study_of(outcome).trials}
    for name in lost:
        assert ended[name]["status"] == "cancelled"
        assert "Ray Tune gave it up" in ended[name]["reason"]
        assert "its worker died" in ended[name]["reason"]
        assert told[name].user_attrs["reason"] == ended[name]["reason"]
    trials = trials_of(run(tmp_path, resume=True, **sections).results)
    assert [trial["status"]["status"] for trial in trials.values()] == ["completed"] * 3


def test_a_worker_that_dies_in_the_confirm_stage_disqualifies_no_trial(tmp_path):
    sections = sections_of(tmp_path)
    kill_worker_when(tmp_path, "s/trials/c000/adapter")
    outcome = run(tmp_path, **sections)
    assert trials_of(outcome.results)["c000"]["status"]["status"] == "cancelled"
    assert build_report(outcome.results).best_id == outcome.best_trial  # of the search, for now
    trials = trials_of(run(tmp_path, resume=True, **sections).results)
    assert {trial["status"]["status"] for trial in trials.values()} == {"completed"}
    assert sum(name.startswith("c") for name in trials) == 2
