"""Whole sweeps under each scheduler, with a loop whose learning curves are known."""

import errno
import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.tune.experiment import Trial

from higgs_tune.config import TrialConfig
from higgs_tune.errors import SweepError
from higgs_tune.sweep.callback import SweepCallback
from higgs_tune.sweep.records import TrialFiles
from tests.integration.test_sweep import run, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]
PAUSING = ("hyperband", "pbt")
EVERY = {name: {"name": name} for name in PAUSING}


def tune(scheduler: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"num_trials": 8, "seed": 3, "scheduler": scheduler, **changes}


def trained(results: Path, trial_id: str) -> list[list[Any]]:
    """The intervals behind a trial's adapter: seed, last step, rate; each step was done once."""
    state = results / "trials" / trial_id / "adapter" / "training_state.json"
    steps = json.loads(state.read_text())["trained"]
    assert [step for _, step, _ in steps] == list(range(1, len(steps) + 1))
    intervals = steps[24::25]
    for seed, step, rate in steps:
        interval = intervals[(step - 1) // 25]
        assert [seed, rate] == [interval[0], interval[2]]
    return intervals


def uninterrupted(config: TrialConfig, last_step: int) -> list[list[Any]]:
    """The same for a run of this configuration without interruption."""
    return [[config.seed, step, config.learning_rate] for step in range(25, last_step + 1, 25)]


def values_at(trials: dict[str, dict[str, Any]], step: int) -> dict[str, float]:
    return {
        name: line["val/text/nll"]
        for name, trial in trials.items()
        for line in trial["metrics"]
        if line["step"] == step
    }


def config_of(trial: dict[str, Any]) -> TrialConfig:
    return TrialConfig.model_validate(trial["record"]["config"])


def check_nobody_was_lost(results: Path, num_trials: int = 8) -> None:
    """Every trial ended well, and trained each of its intervals once."""
    trials = trials_of(results)
    assert sorted(trials) == [f"t{n:03d}" for n in range(num_trials)]
    for name, trial in trials.items():
        assert trial["status"]["status"] in ("completed", "pruned"), trial["status"]
        steps = list(range(25, trial["status"]["step"] + 1, 25))
        assert [line["step"] for line in trial["metrics"]] == steps
        assert [step for _, step, _ in trained(results, name)] == steps


@dataclass
class Usual:
    """A sweep that nothing disturbed."""

    tune: dict[str, Any]
    results: Path
    pids: set[int]  # of its trials' processes
    gone: set[int]  # those of them that had ended before the last result
    num_pauses: int  # as seen; one pause may count several times


@pytest.fixture(scope="module", params=PAUSING)
def usual(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Usual:
    pids, gone, pauses = set(), set(), []
    original = SweepCallback.on_trial_result

    def noted(self, iteration, trials, trial, result, **info):
        pids.add(result["pid"])
        gone.update(pid for pid in pids if not psutil.pid_exists(pid))
        pauses.extend(other for other in trials if other.status == Trial.PAUSED)
        original(self, iteration, trials, trial, result, **info)

    settings = tune(EVERY[request.param], num_trials=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepCallback, "on_trial_result", noted)
        outcome = run(tmp_path_factory.mktemp("usual"), tune=settings)
    return Usual(settings, outcome.results, pids, gone, len(pauses))


def test_the_same_seed_gives_the_same_trials(usual, tmp_path):
    left, right = trials_of(usual.results), trials_of(run(tmp_path, tune=usual.tune).results)
    assert list(left) == list(right)
    for trial_id in left:
        assert left[trial_id]["record"] == right[trial_id]["record"]
        for part in ("status", "step", "reason"):
            assert left[trial_id]["status"][part] == right[trial_id]["status"][part]


def test_a_pause_ends_no_process(usual):
    assert usual.num_pauses
    assert len(usual.pids) == 3  # two slots, and one that waits for the next free one
    assert not usual.gone  # not even an idle one


@pytest.mark.parametrize("name", PAUSING)
def test_a_trial_that_should_continue_in_a_process_that_died_is_not_lost(
    tmp_path, monkeypatch, name
):
    pid_of: dict[str, int] = {}
    killed: list[int] = []
    original = SweepCallback.on_trial_result

    def noted(self, iteration, trials, trial, result, **info):
        pid_of[trial.trial_id] = result["pid"]
        busy = {pid_of.get(t.trial_id) for t in trials if t.status == Trial.RUNNING}
        idle = [pid_of[t.trial_id] for t in trials if t.status == Trial.PAUSED]
        if not killed and (victims := [pid for pid in idle if pid not in busy]):
            killed.append(victims[0])
            os.kill(victims[0], signal.SIGKILL)
        original(self, iteration, trials, trial, result, **info)

    sections = {"tune": tune(EVERY[name])}
    with monkeypatch.context() as patch:
        patch.setattr(SweepCallback, "on_trial_result", noted)
        first = run(tmp_path, **sections)
    assert killed
    statuses = [trial["status"]["status"] for trial in trials_of(first.results).values()]
    assert set(statuses) <= {"completed", "pruned", "cancelled"}
    check_nobody_was_lost(run(tmp_path, resume=True, **sections).results)


@pytest.mark.parametrize("name", PAUSING)
def test_a_time_limit_lets_paused_trials_run_to_their_end(tmp_path, monkeypatch, name):
    heard = SweepCallback.on_trial_result
    paused = []

    def result(self, iteration, trials, trial, result, **info):
        heard(self, iteration, trials, trial, result, **info)
        if not paused and (waiting := self._source.paused()):
            paused.extend(waiting)
            self._source._deadline = 0.0

    monkeypatch.setattr(SweepCallback, "on_trial_result", result)
    settings = tune(EVERY[name], num_trials=500, time_limit_s=3600.0, slots_per_worker=1)
    outcome = run(tmp_path, tune=settings)
    assert paused and 2 < outcome.num_trials < 500
    check_nobody_was_lost(outcome.results, outcome.num_trials)


@pytest.mark.parametrize("name", PAUSING)
def test_trials_that_diverge_do_not_block_the_others(tmp_path, name):
    outcome = run(
        tmp_path,
        space={"learning_rate": {"low": 1e-2, "high": 0.3}},
        tune=tune(EVERY[name], seed=1, slots_per_worker=1),
    )
    statuses = [trial["status"]["status"] for trial in trials_of(outcome.results).values()]
    assert set(statuses) <= {"completed", "pruned", "diverged"}
    assert "diverged" in statuses and "completed" in statuses


@pytest.mark.parametrize("name", PAUSING)
def test_an_interrupted_sweep_continues_from_its_checkpoints(tmp_path, monkeypatch, name):
    written, begun = [], {}

    def full(self, trial_id, content):
        written.append(trial_id)
        if len(written) > 16:  # two wait, some train, some are to come
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, trial_id, content)

    def noted(self, trial_id, content):
        begun.setdefault(trial_id, content["step"])
        original(self, trial_id, content)

    original, results = TrialFiles.result, tmp_path / "s"
    sections = {"tune": tune(EVERY[name], slots_per_worker=1)}
    with monkeypatch.context() as patch:
        patch.setattr(TrialFiles, "result", full)
        with pytest.raises(SweepError, match=r"No space left on device.*--resume"):
            run(tmp_path, **sections)
    cut = {name: trial["metrics"] for name, trial in trials_of(results).items()}
    assert [cut[name][-1]["step"] for name in ("t002", "t003")] == [50, 50]
    monkeypatch.setattr(TrialFiles, "result", noted)
    run(tmp_path, resume=True, **sections)
    check_nobody_was_lost(results)
    assert (begun["t002"], begun["t003"]) == (75, 75)  # from their checkpoints
    for name in ("t000", "t001", "t002", "t003"):
        kept = trials_of(results)[name]["metrics"][: len(cut[name])]
        assert kept == cut[name]  # with the speed, which differs in every run


@pytest.mark.parametrize("name", PAUSING)
def test_no_trial_is_lost_when_the_worker_dies(tmp_path, name):
    pids = tmp_path / "pids"

    def kill_once() -> None:
        while len(list(tmp_path.glob("s/trials/*/adapter"))) < 6:
            time.sleep(0.02)
        os.kill(int(pids.read_text().splitlines()[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    outcome = run(
        tmp_path,
        base={"path": f"pid:{pids}"},
        tune=tune(EVERY[name], slots_per_worker=1),
    )
    assert len(pids.read_text().splitlines()) == 2
    check_nobody_was_lost(outcome.results)


@pytest.mark.parametrize("name", PAUSING)
def test_several_workers_lose_no_paused_trial(tmp_path, name):
    workers = {"num_workers": 2, "slots_per_worker": 2, "cpus_per_worker": 1}
    check_nobody_was_lost(run(tmp_path, tune=tune(EVERY[name], **workers)).results)


@pytest.mark.parametrize("name", ["asha", "median", "hyperband"])
def test_a_trial_whose_process_dies_before_it_is_stopped_trains_no_further(
    tmp_path, monkeypatch, name
):
    original = SweepCallback.on_trial_result
    stopped: list[tuple[str, int]] = []

    def noted(self, iteration, trials, trial, result, **info):
        if not stopped and result["done"] and result["status"] == "running":
            stopped.append((trial.config["id"], result["step"]))
            os.kill(result["pid"], signal.SIGKILL)  # its checkpoint is on its way
        original(self, iteration, trials, trial, result, **info)

    monkeypatch.setattr(SweepCallback, "on_trial_result", noted)
    outcome = run(tmp_path, tune=tune({"name": name}, num_trials=12, slots_per_worker=2))
    ((trial_id, step),) = stopped
    end = trials_of(outcome.results)[trial_id]["status"]
    assert (end["status"], end["step"]) == ("pruned", step)
    check_nobody_was_lost(outcome.results, 12)
