"""Sweeps in a process of their own that are interrupted, killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
from optuna.trial import TrialState

from higgs_tune.config import SweepConfig
from higgs_tune.config_file import load_sweep, to_yaml, validate
from higgs_tune.files import read_json_lines
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.driver import run_sweep
from higgs_tune.sweep.records import read_json
from tests.integration.conftest import Start

pytestmark = pytest.mark.integration


@pytest.fixture
def sweep(tmp_path: Path, start_process: Start) -> Start:
    """Starts a sweep in tmp_path that is slow enough to be stopped."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/slow").touch()
    config = validate(
        SweepConfig,
        {
            "name": "s",
            "results_dir": str(tmp_path / "results"),
            "base": {"path": str(tmp_path / "base")},
            "tune": {"num_trials": 7, "seed": 3, "slots_per_worker": 2},
            "confirm": {"num_configs": 1, "num_seeds": 1},
        },
        "test",
    )
    (tmp_path / "sweep.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "tests.sweep_process", str(tmp_path / "sweep.yaml")]
    return lambda *options, **environment: start_process(*command, *options, **environment)


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def steps_of(results: Path) -> dict[str, list[int]]:
    return {
        folder.name: [line["step"] for line in read_json_lines(folder / "metrics.jsonl")]
        for folder in sorted((results / "trials").glob("*"))
    }


def statuses_of(results: Path) -> dict[str, str]:
    found = {p.parent.name: read_json(p) for p in sorted(results.glob("trials/*/status.json"))}
    return {name: status["status"] for name, status in found.items() if status is not None}


def end(process: subprocess.Popen[str], number: signal.Signals, results: Path) -> None:
    """End a sweep with a signal; every trial that has begun must have a recorded status."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert set(statuses_of(results)) == set(steps_of(results))
    assert "cancelled" in statuses_of(results).values()
    study = studies.open_study("s", results, None)
    assert not [trial for trial in study.trials if trial.state == TrialState.RUNNING]


@pytest.mark.usefixtures("local_ray")
def test_a_terminated_interrupted_and_killed_sweep_is_resumed_without_loss(sweep, tmp_path):
    results = tmp_path / "results" / "s"

    process = sweep()
    assert process.stdout is not None
    started = next(line for line in process.stdout if line.startswith('{"event": "sweep_started"'))
    with urlopen(f"http://{json.loads(started)['dashboard']}/api/version", timeout=30) as answer:
        assert json.load(answer)["ray_version"] == ray.__version__
    wait_until(lambda: any(steps_of(results).values()), process)
    end(process, signal.SIGTERM, results)

    # from here on the sweeps join this process's Ray, which saves starting two more
    joined = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = sweep("--resume", **joined)
    wait_until(lambda: any(len(steps) >= 3 for steps in steps_of(results).values()), process)
    end(process, signal.SIGINT, results)
    cancelled = [name for name, status in statuses_of(results).items() if status == "cancelled"]
    partial = steps_of(results)

    process = sweep("--resume", **joined)
    wait_until(lambda: len(steps_of(results)) >= 5, process)
    process.kill()
    process.wait()
    assert len(statuses_of(results)) < len(steps_of(results))
    for name in cancelled:  # it continued, it did not start again
        assert set(partial[name]) <= set(steps_of(results)[name])

    # the last in this process, which saves its imports
    (tmp_path / "base/slow").unlink()
    outcome = run_sweep(
        load_sweep(tmp_path / "sweep.yaml"),
        resume=True,
        command=["test"],
        loop_path="tests.fake_loop:FakeLoop",
    )
    assert outcome.exit_code == 0
    statuses = statuses_of(results)
    assert sorted(n for n in statuses if n[0] == "t") == [f"t{n:03d}" for n in range(7)]
    assert set(statuses.values()) <= {"completed", "pruned"}
    assert sum(name[0] == "c" for name in statuses) == 2
    for name, steps in steps_of(results).items():
        assert steps == list(range(25, 25 * len(steps) + 1, 25)), name
    newest = studies.latest(studies.open_study("s", results, None))
    assert {trial.state for trial in newest.values()} <= {TrialState.COMPLETE, TrialState.PRUNED}
