"""Whole sweeps on a shared local Ray, with a loop whose learning curves are known."""

import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.execution.tune_controller import TuneController

from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.errors import ModelError, SweepError
from higgs_tune.files import read_json_lines
from higgs_tune.metrics import STATUSES
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.callback import SweepCallback
from higgs_tune.sweep.driver import SweepOutcome, run_sweep
from higgs_tune.sweep.records import TrialFiles, read_json
from higgs_tune.sweep.worker.meter import KINDS
from tests.boards import events
from tests.fake_loop import curve

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def run(folder: Path, *, resume: bool = False, **sections: Any) -> SweepOutcome:
    return run_sweep(
        config_of(folder, **sections),
        resume=resume,
        command=["test"],
        loop_path="tests.fake_loop:FakeLoop",
    )


def config_of(folder: Path, **sections: Any) -> SweepConfig:
    raw = {
        "name": "s",
        "results_dir": str(folder),
        "space": {"cross_attention": ["off", "audio_self", "text_to_audio"]},
        "tune": {"num_trials": 10, "seed": 3},
        "confirm": {"num_configs": 0},
        **sections,
    }
    few = {"slots_per_worker": 2}  # every trial's process takes seconds to start
    return validate(SweepConfig, {**raw, "tune": {**few, **raw["tune"]}}, "test")


def trials_of(results: Path) -> dict[str, dict[str, Any]]:
    return {
        folder.name: {
            "record": read_json(folder / "config.json"),
            "status": read_json(folder / "status.json"),
            "metrics": read_json_lines(folder / "metrics.jsonl"),
        }
        for folder in sorted((results / "trials").iterdir())
    }


def study_of(outcome: SweepOutcome) -> optuna.Study:
    return studies.open_study("s", outcome.results, None)


@pytest.fixture(scope="module")
def watched():
    """What Tune writes on the driver's disk, noted in two patched functions."""
    noted: dict[str, list[Any]] = {"states": [], "checkpoints": []}
    write_state, tell = TuneController.save_to_dir, SweepCallback.on_checkpoint

    def save_to_dir(self):
        noted["states"].append(None)
        write_state(self)

    def on_checkpoint(self, iteration, trials, trial, checkpoint, **info):
        tell(self, iteration, trials, trial, checkpoint, **info)
        self._later.wait(trial.config["id"])
        noted["checkpoints"].append(len(list(Path(checkpoint.path).parent.glob("checkpoint_*"))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TuneController, "save_to_dir", save_to_dir)
        patch.setattr(SweepCallback, "on_checkpoint", on_checkpoint)
        yield noted


@pytest.fixture(scope="module")
def first(tmp_path_factory, watched) -> SweepOutcome:
    confirm = {"num_configs": 1, "num_seeds": 2}
    return run(tmp_path_factory.mktemp("first"), confirm=confirm)


def test_tune_keeps_one_checkpoint_per_trial_and_writes_state_only_per_stage(first, watched):
    assert len(watched["checkpoints"]) >= 20
    assert set(watched["checkpoints"]) == {1}
    assert len(watched["states"]) <= 2 * 2  # at the start and the end of each stage


def test_a_sweep_leaves_every_expected_file(first):
    assert first.exit_code == 0
    names = {path.name for path in first.results.iterdir()} - {".lock"}
    assert names == {
        "base.json", "env.json", "study.journal", "sweep.yaml", "tensorboard", "trials", "tune.log",
        "workers.json",
    }  # fmt: skip
    (worker,) = (read_json(first.results / "workers.json") or {}).values()
    assert sum(worker[kind] for kind in KINDS) == pytest.approx(worker["wall_s"], abs=0.01)
    assert 0 < worker["train_s"] < worker["wall_s"]
    assert 0 < worker["occupancy"] <= 1
    base = read_json(first.results / "base.json")
    assert base["preflight"] == {"ok": True}
    assert base["num_val_clips"] == 2
    assert base["content_hash"] == "0" * 64
    trials = trials_of(first.results)
    assert [name for name in trials if name[0] == "t"] == [f"t{n:03d}" for n in range(10)]
    for name, trial in trials.items():
        assert trial["status"]["status"] in STATUSES
        assert trial["record"]["account"]["parameters"] == 1000 * trial["record"]["config"]["rank"]
        assert trial["metrics"][-1]["step"] == trial["status"]["step"]
        adapter = first.results / "trials" / name / "adapter"
        state = json.loads((adapter / "training_state.json").read_text())
        assert state["step"] == trial["status"]["step"]


def test_each_trials_curve_is_that_of_its_configuration(first):
    for trial in trials_of(first.results).values():
        config = TrialConfig.model_validate(trial["record"]["config"])
        for line in trial["metrics"]:
            expected = curve(config, line["step"])
            assert line["val/text/nll"] == expected["val/text/nll"]


def test_tensorboard_has_every_trials_curve(first):
    for name, trial in trials_of(first.results).items():
        shown = events(first.results / "tensorboard" / name)["val/text/nll"]
        assert list(shown) == [line["step"] for line in trial["metrics"]], name
        assert list(shown.values()) == pytest.approx(
            [line["val/text/nll"] for line in trial["metrics"]]
        )


def test_study_and_files_agree_on_how_each_trial_ended(first):
    states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    newest = studies.latest(study_of(first))
    trials = trials_of(first.results)
    seen = set()
    for index, trial in newest.items():
        files = trials[f"t{index:03d}"]
        seen.add(files["status"]["status"])
        assert trial.state == states[files["status"]["status"]]
        values = {line["step"]: line["val/text/nll"] for line in files["metrics"]}
        assert trial.intermediate_values == values
        assert files["status"]["feasible"] is True
    assert seen == {"completed", "pruned"}


def test_the_best_and_the_baseline_are_confirmed_at_full_budget(first):
    confirmed = {n: t for n, t in trials_of(first.results).items() if n[0] == "c"}
    assert sorted(confirmed) == ["c000", "c001", "c002", "c003"]
    assert [t["record"]["confirms"] for t in confirmed.values()] == ["t000", first.best_trial] * 2
    assert {t["status"]["status"] for t in confirmed.values()} == {"completed"}
    assert {t["status"]["step"] for t in confirmed.values()} == {150}


def test_the_same_seed_gives_the_same_trials_in_another_run(first, tmp_path):
    second = run(tmp_path, confirm={"num_configs": 1, "num_seeds": 2})
    left, right = trials_of(first.results), trials_of(second.results)
    assert list(left) == list(right)
    for name in left:
        assert left[name]["record"] == right[name]["record"]
        for part in ("status", "step", "reason"):
            assert left[name]["status"][part] == right[name]["status"][part]
        nlls = [[line["val/text/nll"] for line in t[name]["metrics"]] for t in (left, right)]
        assert nlls[0] == nlls[1]


def test_a_finished_sweep_can_be_extended_and_keeps_its_finished_trials(first, tmp_path):
    shutil.copytree(first.results, tmp_path / "s")
    before = trials_of(tmp_path / "s")
    outcome = run(tmp_path, resume=True, tune={"num_trials": 12, "seed": 3})
    after = trials_of(tmp_path / "s")
    assert sorted(set(after) - set(before)) == ["t010", "t011"]
    assert {name: after[name] for name in before} == before
    assert outcome.num_trials == 12


def test_resuming_a_finished_sweep_runs_nothing(first, tmp_path, monkeypatch):
    shutil.copytree(first.results, tmp_path / "s")
    monkeypatch.delattr("higgs_tune.sweep.driver.Workers")
    before = trials_of(tmp_path / "s")
    outcome = run(tmp_path, resume=True, confirm={"num_configs": 1, "num_seeds": 2})
    assert (outcome.exit_code, outcome.best_trial) == (0, first.best_trial)
    assert trials_of(tmp_path / "s") == before


def test_diverged_failed_infeasible_and_too_large_trials_are_recorded_as_such(tmp_path):
    outcome = run(
        tmp_path,
        space={
            "learning_rate": {"low": 1e-2, "high": 1.0},
            "audio_loss_weight": {"low": 0.0, "high": 0.02},
            "batch_clips": [8, 13, 17],
        },
        tune={"num_trials": 14, "seed": 1},
    )
    ended = {name: trial["status"] for name, trial in trials_of(outcome.results).items()}
    by_status: dict[str, list[str]] = {}
    for name, status in ended.items():
        by_status.setdefault(status["status"], []).append(name)
    assert {"diverged", "failed", "out_of_memory"} <= set(by_status)
    newest = studies.latest(study_of(outcome))
    for name in by_status["diverged"] + by_status["failed"] + by_status["out_of_memory"]:
        trial = newest[int(name[1:])]
        assert (trial.state, trial.constraints) == (TrialState.PRUNED, {"broke": 1.0})
        assert trial.user_attrs["reason"] == ended[name]["reason"]
        assert all(math.isfinite(value) for value in trial.intermediate_values.values())
    diverged = trials_of(outcome.results)[by_status["diverged"][0]]
    assert "val/text/nll" not in diverged["metrics"][-1]
    assert diverged["metrics"][-1]["val/audio/nll_per_code"] is None
    infeasible = [name for name, status in ended.items() if status["feasible"] is False]
    assert infeasible
    if outcome.best_trial is not None:
        assert ended[outcome.best_trial]["feasible"] is True


def test_no_trial_is_lost_when_the_worker_dies(tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def kill_once() -> None:
        while len(list(tmp_path.glob("s/trials/*/adapter"))) < 3:
            time.sleep(0.05)
        os.kill(int(pids.read_text().splitlines()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    outcome = run(tmp_path, base={"path": f"pid:{pids}"}, tune={"num_trials": 6, "seed": 3})
    assert len(pids.read_text().splitlines()) == 2
    trials = trials_of(outcome.results)
    assert sorted(trials) == [f"t{n:03d}" for n in range(6)]
    assert {t["status"]["status"] for t in trials.values()} <= {"completed", "pruned"}
    for trial in trials.values():
        steps = [line["step"] for line in trial["metrics"]]
        assert steps == list(range(25, trial["status"]["step"] + 1, 25))


def test_a_killed_trial_gets_a_slot_again_and_its_neighbours_are_unaffected(tmp_path, monkeypatch):
    killed = []

    def result(self, trial_id, content):
        original(self, trial_id, content)
        if trial_id == "t001" and content["step"] == 50 and not killed:
            killed.append(content["pid"])
            os.kill(content["pid"], signal.SIGKILL)

    original = TrialFiles.result
    monkeypatch.setattr(TrialFiles, "result", result)
    pids = tmp_path / "pids"
    tune = {"num_trials": 6, "seed": 3, "scheduler": {"name": "none"}}
    outcome = run(tmp_path, base={"path": f"pid:{pids}"}, tune=tune)
    assert len(killed) == 1
    assert len(pids.read_text().splitlines()) == 1  # the worker went on
    trials = trials_of(outcome.results)
    assert len(trials) == 6
    for name, trial in trials.items():
        config = TrialConfig.model_validate(trial["record"]["config"])
        assert trial["status"]["status"] == "completed", name
        assert [(line["step"], line["val/text/nll"]) for line in trial["metrics"]] == [
            (step, curve(config, step)["val/text/nll"]) for step in range(25, 151, 25)
        ], name


def test_a_base_that_cannot_be_loaded_ends_the_sweep_with_its_error(tmp_path):
    with pytest.raises(ModelError, match="no such checkpoint"):
        run(tmp_path, base={"path": "broken"}, tune={"slots_per_worker": 1})


def test_a_disk_that_fills_up_ends_the_sweep_and_loses_nothing(tmp_path, monkeypatch):
    written = []

    def result(self, trial_id, content):
        written.append(trial_id)
        if len(written) > 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, trial_id, content)

    original = TrialFiles.result
    tune = {"num_trials": 5, "seed": 3, "slots_per_worker": 1}
    with monkeypatch.context() as patch:
        patch.setattr(TrialFiles, "result", result)
        with pytest.raises(SweepError, match=r"No space left on device.*--resume"):
            run(tmp_path, tune=tune)
    lines = {name: len(trial["metrics"]) for name, trial in trials_of(tmp_path / "s").items()}
    assert sum(lines.values()) == 10
    run(tmp_path, resume=True, tune=tune)
    trials = trials_of(tmp_path / "s")
    assert len(trials) == 5
    assert {t["status"]["status"] for t in trials.values()} <= {"completed", "pruned"}
    for trial in trials.values():
        steps = [line["step"] for line in trial["metrics"]]
        assert steps == list(range(25, trial["status"]["step"] + 1, 25))


def test_a_time_limit_ends_the_search_but_lets_begun_trials_end(tmp_path):
    tune = {"num_trials": 500, "time_limit_s": 1.0, "slots_per_worker": 1}
    outcome = run(tmp_path, tune=tune)
    statuses = {trial["status"]["status"] for trial in trials_of(outcome.results).values()}
    assert outcome.num_trials < 500
    assert statuses and statuses <= {"completed", "pruned"}
