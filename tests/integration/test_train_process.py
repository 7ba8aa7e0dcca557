"""`higgs-tune train` in its own processes: terminated, killed, resumed, and two together."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from higgs_tune import cli
from tests.integration.conftest import Start
from tests.runs import CLOCKS

pytestmark = pytest.mark.integration
SETTINGS = {
    "base": {"path": "embedded", "device": "cpu"},
    "data": {"path": "embedded:arabic", "num_val_clips": 4},
    "trial": {
        "rank": 4,
        "alpha": 32.0,
        "targets": ["attention", "text_mlp", "audio_mlp"],
        "learning_rate": 1e-3,
        "batch_clips": 2,
        "num_steps": 60,
        "report_every_steps": 12,
    },
    "run": {"num_samples": 2, "max_sample_tokens": 8},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "best_config.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    """The whole run, in this process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert cli.main(["train", "--config", str(config), "--out", str(out)]) == 0
    return out


@pytest.fixture
def start(config: Path, tmp_path: Path, start_process: Start) -> Start:
    """Starts the command, through a launcher if one is given."""

    def run(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "-m", "higgs_tune.cli", "train"]
        return start_process(
            *command, "--config", str(config), "--out", str(tmp_path / "out"), *arguments
        )

    return run


def lines_of(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(lines_of(out)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def assert_equal_runs(out: Path, expected: Path, tolerance: float) -> None:
    """Weights, moments and figures of every line."""
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        ours, theirs = load_file(out / "adapter" / name), load_file(expected / "adapter" / name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert [line["step"] for line in lines_of(out)] == [0, 12, 24, 36, 48, 60]
    for line, other in zip(lines_of(out), lines_of(expected), strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - CLOCKS:
            if isinstance(line[name], float):
                assert line[name] == pytest.approx(other[name], rel=0, abs=tolerance), name
            else:
                assert line[name] == other[name], name


def test_a_run_ended_by_sigterm_and_then_killed_gives_the_same_results(
    start, config, uninterrupted, tmp_path
):
    out = tmp_path / "out"
    save_often = ("--set", "run.save_every_steps=5")
    process = start("--auto-resume", *save_often)
    wait_for_lines(out, 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "ended by SIGTERM after step" in output
    assert "Traceback" not in output

    process = start("--auto-resume", *save_often)  # the same command again
    wait_for_lines(out, 3, process)
    delay = random.uniform(0, 1.5)
    time.sleep(delay)
    process.kill()
    process.communicate()
    print(f"killed {delay:.2f} s behind step 24's line, lines then {len(lines_of(out))}")

    # to the end in this process: another one would load torch again
    command = ["train", "--config", str(config), "--out", str(out), "--resume", *save_often]
    assert cli.main(command) == 0
    assert_equal_runs(out, uninterrupted, 1e-6)
    samples = [(out_ / "samples.jsonl").read_text() for out_ in (out, uninterrupted)]
    assert samples[0] == samples[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_processes_equal_one_with_twice_the_batch(start, uninterrupted, tmp_path):
    # with one clip each, a process often has no text target, or no audio target, of its own
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    launcher += ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launcher += ("--main_process_port", str(free_port()))
    process = start("--set", "trial.batch_clips=1", launcher=launcher)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert_equal_runs(tmp_path / "out", uninterrupted, 1e-5)
    printed = [json.loads(text) for text in output.splitlines() if text.startswith("{")]
    assert [line["step"] for line in printed] == [0, 12, 24, 36, 48, 60]


@pytest.fixture
def unfinished(uninterrupted, tmp_path) -> Path:
    """A run of two processes that was killed before its last line."""
    out = shutil.copytree(uninterrupted, tmp_path / "unfinished")
    settings = json.loads((out / "config.json").read_text())
    settings |= {"clips_per_step": 4, "num_processes": 2}
    (out / "config.json").write_text(json.dumps(settings))
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:-1]))
    return out


@pytest.mark.parametrize("differing", ["checkpoint", "data"])
def test_machines_with_different_files_are_refused(
    config, start_process, unfinished, tmp_path, differing
):
    # the second machine lacks the run's folder, or has another dataset under the same name
    command = (sys.executable, "-m", "higgs_tune.cli", "train", "--config", str(config), "--resume")
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = {
        "checkpoint": [("--out", str(unfinished)), ("--out", str(tmp_path / "absent"))],
        "data": [
            ("--out", str(unfinished), "--data", f"embedded:{n}") for n in ("arabic", "french")
        ],
    }[differing]
    processes = [
        start_process(*command, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank, arguments in enumerate(own)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 2, output
        assert f"not the same {differing} in every process" in output
        assert "Traceback" not in output
