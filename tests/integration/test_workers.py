"""Sweeps whose workers differ from each other, fail, or give warnings."""

import io
import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from higgs_tune.errors import ConfigError, NoMemoryError, SweepError
from higgs_tune.sweep import driver, slots, workers
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.records import TrialFiles, read_json
from tests.integration.test_sweep import run, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]
ONE_SLOT = {"seed": 3, "slots_per_worker": 1}  # every trial's process takes seconds to start
TWO = {"num_trials": 8, "num_workers": 2, "slots_per_worker": 1, "cpus_per_worker": 1}


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (
            "load",
            NoMemoryError,
            r"worker-\d on node \S+ finds no memory for base and data: .*CUDA error",
        ),
        # timing decides which of the two answers first, and so is what the other is compared with
        (
            "data",
            ConfigError,
            r"worker-\d on node \S+: its dataset has content_hash (0{64}, needed 1|1{64}, needed 0)",
        ),
    ],
)
def test_a_worker_that_is_not_like_the_first_ends_the_sweep(tmp_path, what, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, base={"path": f"odd:{what}:{tmp_path / 'first'}"}, tune=TWO)
    ended = [read_json(path) or {} for path in tmp_path.glob("s/trials/*/status.json")]
    # the first may have trained some to their end before the other was refused
    assert {status["status"] for status in ended} <= {"completed", "pruned", "cancelled"}


def listen(patch: pytest.MonkeyPatch) -> io.StringIO:
    """Gets the lines of sweeps; on standard output, Ray may print deaths of actors between them."""
    stream = io.StringIO()
    patch.setattr(driver, "Display", partial(Display, stream))
    return stream


def test_other_output_during_a_sweep_goes_to_standard_error(tmp_path, monkeypatch, capsys):
    record, text = TrialFiles.result, "a worker died, as Ray prints it"

    def print_as_ray_does(self, trial_id, result):
        record(self, trial_id, result)
        print(text)

    monkeypatch.setattr(TrialFiles, "result", print_as_ray_does)
    run(tmp_path, tune={**ONE_SLOT, "num_trials": 1})
    printed = capsys.readouterr()
    assert '"sweep_started"' in printed.out and text not in printed.out
    assert text in printed.err


def test_a_worker_that_starts_again_on_a_bad_gpu_gets_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PAUSE_S", 0.5)
    printed = listen(monkeypatch)
    processes, killed = tmp_path / "processes", []
    record = TrialFiles.result

    def kill_the_worker(self, trial_id, result):
        record(self, trial_id, result)
        if not killed:
            killed.append(int(processes.read_text()))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(TrialFiles, "result", kill_the_worker)
    tune = {**ONE_SLOT, "num_trials": 3, "scheduler": {"name": "none"}}
    outcome = run(tmp_path, base={"path": f"ill:{processes}"}, tune=tune)
    ended = {trial["status"]["status"] for trial in trials_of(outcome.results).values()}
    assert ended == {"completed"} and outcome.num_trials == 3
    # the first, one that meets the bad GPU, one that works
    assert len(set(processes.read_text().split())) == 3
    events = [json.loads(text) for text in printed.getvalue().splitlines()]
    (said,) = [e["message"] for e in events if "ECC" in e.get("message", "")]
    assert said.endswith("uncorrectable ECC error encountered; it tries again every 0 s")


class OnBadNodes:
    """A worker's settings, which cannot be unpickled as many times as the file says."""

    def __init__(self, config, file):
        self.config, self.file = config, file

    def __reduce__(self):
        return read_settings, (self.config, self.file)


def read_settings(config, file):
    left = int(file.read_text() or 0) if file.exists() else 0
    if left:
        file.write_text(str(left - 1))
        raise ModuleNotFoundError("No module named 'higgs_tune'")
    return config


def test_a_worker_that_cannot_start_on_its_new_machine_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PAUSE_S", 0.5)
    printed = listen(monkeypatch)
    pids, bad, killed = tmp_path / "pids", tmp_path / "bad", []
    whole, record = workers.absolute_paths, TrialFiles.result

    def kill_the_worker(self, trial_id, result):
        record(self, trial_id, result)
        if not killed:
            bad.write_text("2")
            killed.append(int(pids.read_text()))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(workers, "absolute_paths", lambda config: OnBadNodes(whole(config), bad))
    monkeypatch.setattr(TrialFiles, "result", kill_the_worker)
    tune = {**ONE_SLOT, "num_trials": 3, "scheduler": {"name": "none"}}
    outcome = run(tmp_path, base={"path": f"pid:{pids}"}, tune=tune)
    ended = {trial["status"]["status"] for trial in trials_of(outcome.results).values()}
    assert ended == {"completed"} and outcome.num_trials == 3
    assert len(pids.read_text().split()) == 2 and bad.read_text() == "0"
    events = [json.loads(text) for text in printed.getvalue().splitlines()]
    (said,) = [e["message"] for e in events if "cannot start" in e.get("message", "")]
    assert said.startswith("worker-0 cannot start: ")
    assert "No module named 'higgs_tune'" in said
    assert said.endswith("and enough memory; it tries again every 0 s")


def test_a_worker_that_can_never_start_ends_the_sweep(tmp_path, monkeypatch):
    bad = tmp_path / "bad"
    bad.write_text("9")
    whole = workers.absolute_paths
    monkeypatch.setattr(workers, "absolute_paths", lambda config: OnBadNodes(whole(config), bad))
    with pytest.raises(SweepError, match=r"^worker-0 cannot start: .*No module named 'higgs_tune'"):
        run(tmp_path, tune={**ONE_SLOT, "num_trials": 2})


def test_trials_of_a_worker_that_no_longer_finds_memory_go_to_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PAUSE_S", 0.5)
    processes, heard, killed = tmp_path / "processes", set(), []
    record = TrialFiles.result

    def kill_a_worker(self, trial_id, result):
        record(self, trial_id, result)
        heard.add(trial_id)
        if killed and len(processes.read_text().split()) == 2:
            time.sleep(1)  # the sweep must not end before that worker has tried to come back
        if not killed and {"t000", "t001"} <= heard:
            killed.append(int(processes.read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(TrialFiles, "result", kill_a_worker)
    tune = {**TWO, "scheduler": {"name": "none"}}
    outcome = run(tmp_path, base={"path": f"scarce:{processes}"}, tune=tune)
    assert killed and len(processes.read_text().split()) > 2
    ended = {name: trial["status"] for name, trial in trials_of(outcome.results).items()}
    assert [status and status["status"] for status in ended.values()] == ["completed"] * 8


def test_a_worker_that_is_killed_each_time_it_loads_ends_the_sweep(tmp_path):
    with pytest.raises(SweepError, match=r"^worker-0 ends each time it loads base and data"):
        run(tmp_path, base={"path": "killed"}, tune={**ONE_SLOT, "num_trials": 3})
    ended = [read_json(path) or {} for path in tmp_path.glob("s/trials/*/status.json")]
    assert {status["status"] for status in ended} <= {"cancelled"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A small sweep whose worker warns: its results and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        printed = listen(patch)
        patch.setattr(workers, "PATIENCE_S", 600.0)  # no warning because the machine is busy
        tune = {**ONE_SLOT, "num_trials": 2}
        outcome = run(tmp_path_factory.mktemp("whole"), base={"path": "warns"}, tune=tune)
    return outcome.results, printed.getvalue()


def test_a_resumed_sweep_refuses_data_that_was_prepared_again(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "s")
    base, trials = (tmp_path / "s/base.json"), trials_of(tmp_path / "s")
    other = json.dumps({**(read_json(base) or {}), "content_hash": "1" * 64})
    base.write_text(other)
    with pytest.raises(ConfigError, match=r"content_hash 0{64}, needed 1{64} .*base\.json") as e:
        run(tmp_path, resume=True, base={"path": "warns"}, tune={**ONE_SLOT, "num_trials": 4})
    assert "--name NAME" in str(e.value)
    assert base.read_text() == other
    after = trials_of(tmp_path / "s")
    assert {name: after[name] for name in trials} == trials
    assert {trial["metrics"] == [] for name, trial in after.items() if name not in trials} <= {True}


def test_a_worker_that_never_starts_does_not_block_the_other(tmp_path):
    cpus = int(ray.cluster_resources()["CPU"])
    tune = {**TWO, "num_trials": 5, "cpus_per_worker": cpus, "scheduler": {"name": "none"}}
    outcome = run(tmp_path, tune=tune)
    ended = {trial["status"]["status"] for trial in trials_of(outcome.results).values()}
    assert ended == {"completed"} and outcome.num_trials == 5


def test_warnings_of_a_worker_reach_the_display_and_workers_log(whole):
    results, printed = whole
    (line,) = (results / "workers.log").read_text().splitlines()
    assert line.startswith("worker-0 ")
    assert line.endswith("WARNING higgs_tune.tests: memory ran out in a training step")
    events = [json.loads(text) for text in printed.splitlines()]
    assert [e["message"] for e in events if e["event"] == "warning"] == [line]
    accepted = [e for e in events if e["event"] == "base_loaded"]
    assert [e["worker"] for e in accepted] == ["worker-0"]


def test_slots_of_workers_without_gpus_are_counted_on_this_machine(tmp_path):
    off = {"cross_attention": ["off"]}  # predicting memory takes seconds for every mode
    outcome = run(tmp_path, space=off, tune={"num_trials": 2, "slots_per_worker": "auto"})
    assert outcome.num_trials == 2
    assert read_json(tmp_path / "s/env.json")["slots_per_worker"] == 2


def test_ctrl_c_ends_a_sweep_whose_slots_no_machine_can_count(tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "PATIENCE_S", 1.0)
    monkeypatch.setattr(Display, "warn", lambda self, text: (said.append(text), interrupt()))
    said = []
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
    auto = {"slots_per_worker": "auto", "gpus_per_worker": 1, "cpus_per_worker": 1}
    outcome = run(tmp_path, tune=auto)
    assert (outcome.exit_code, outcome.num_trials) == (130, 0)
    assert len(said) == 1 and "it needs 1 CPU, 1 GPU" in said[0]
    assert "auto" in (tmp_path / "s/sweep.yaml").read_text()
    outcome = run(tmp_path, resume=True, tune={"num_trials": 2, "slots_per_worker": 1})
    assert (outcome.exit_code, outcome.num_trials) == (0, 2)


def test_a_workers_process_has_the_same_priority_as_this_one(local_ray):
    """By default Ray lowers its workers' priority, so that a pack would yield to starting processes."""
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)
