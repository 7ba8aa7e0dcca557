"""How the command line handles arguments, outcomes and errors."""

import argparse
import errno
import json
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import higgs_tune
from higgs_tune import cli
from higgs_tune.config import SweepConfig
from higgs_tune.config_file import load_sweep, to_yaml, validate
from higgs_tune.errors import ConfigError


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_sweep_arguments(parser)
    return parser.parse_args(arguments)


def settings(*arguments: str) -> SweepConfig:
    return cli._sweep_config(parsed(*arguments))


def store(folder: Path, **sections) -> SweepConfig:
    """Write the sweep.yaml of a sweep that began in this folder."""
    config = validate(SweepConfig, {"name": folder.name, **sections}, "test")
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(to_yaml(config))
    return config


def test_resume_uses_the_settings_that_the_sweep_began_with(tmp_path):
    stored = store(tmp_path / "wide", space={"rank": [2]}, tune={"num_trials": 32})
    place = ("--set", f"results_dir={tmp_path}", "--name", "wide", "--resume")
    here = {"results_dir": str(tmp_path)}
    assert settings(*place) == stored.model_copy(update=here)
    more = settings(*place, "--set", "tune.num_trials=64")
    assert more.tune.num_trials == 64
    assert more.space == stored.space


def test_resume_with_a_config_uses_that_config(tmp_path):
    store(tmp_path / "wide", space={"rank": [2]})
    other = tmp_path / "other.yaml"
    other.write_text(f"results_dir: {tmp_path}\nspace: {{rank: [4]}}\n")
    config = settings("--config", str(other), "--name", "wide", "--resume")
    assert config.space.rank == (4,)


def test_resume_without_a_name_continues_the_newest_sweep(tmp_path):
    store(tmp_path / "quick")
    store(tmp_path / "quick-2", space={"rank": [2]})
    config = settings("--resume", "--set", f"results_dir={tmp_path}")
    assert (config.name, config.space.rank) == ("quick-2", (2,))


def test_resume_without_a_name_skips_a_sweep_that_never_started(tmp_path):
    store(tmp_path / "quick", space={"rank": [2]})
    (tmp_path / "quick" / "trials").mkdir()
    store(tmp_path / "quick-2", tune={"gpus_per_worker": 1})
    config = settings("--resume", "--set", f"results_dir={tmp_path}")
    assert (config.name, config.space.rank) == ("quick", (2,))


def test_auto_resume_starts_a_sweep_or_continues_the_one_of_its_name(tmp_path):
    arguments = parsed("--auto-resume", "--set", f"results_dir={tmp_path}")
    for begun in (False, True, True):  # the same command every time
        config = cli._sweep_config(arguments)
        assert (config.name, arguments.resume) == ("quick", begun)
        if not begun:
            store(tmp_path / "quick", space={"rank": [2]})
            (tmp_path / "quick" / "trials" / "t000").mkdir(parents=True)
            (tmp_path / "quick" / "trials" / "t000" / "metrics.jsonl").write_text("{}\n")
    assert config.space.rank == (2,), "as it began"
    with pytest.raises(SystemExit):
        parsed("--auto-resume", "--resume")


def test_a_new_sweep_takes_the_first_name_without_results(tmp_path):
    place = ("--set", f"results_dir={tmp_path}")
    assert settings(*place).name == "quick"
    store(tmp_path / "quick")
    assert settings(*place).name == "quick"
    (tmp_path / "quick" / "trials" / "t000").mkdir(parents=True)
    (tmp_path / "quick" / "trials" / "t000" / "metrics.jsonl").write_text("{}\n")
    assert settings(*place).name == "quick-2"
    store(tmp_path / "quick-2")
    assert settings(*place).name == "quick-2"


def test_the_default_sweep_is_found_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_sweep(Path(__file__).parents[2] / "sweeps" / "quick.yaml")
    assert settings("--name", expected.name) == expected


def test_an_installed_package_falls_back_to_its_own_copies_of_the_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copies = tmp_path / "site" / "higgs_tune" / "sweeps"
    copies.mkdir(parents=True)
    (copies / "quick.yaml").write_text("space: {rank: [3]}")
    (copies / "human.yaml").write_text("space: {rank: [5]}")
    monkeypatch.setattr(higgs_tune, "__file__", str(copies.parent / "__init__.py"))
    assert settings("--name", "s").space.rank == (3,)
    named = ("--config", "sweeps/human.yaml", "--name", "s")
    assert settings(*named).space.rank == (5,)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "human.yaml").write_text("space: {rank: [7]}")
    assert settings(*named).space.rank == (7,)
    with pytest.raises(ConfigError, match=r"human\.yaml: no such file"):
        settings("--config", "human.yaml", "--name", "s")


def ended(monkeypatch, *, exit_code: int, best_id: str | None) -> int:
    """The exit code of a sweep whose search ended with `exit_code` and whose report found `best_id`."""
    outcome = SimpleNamespace(results=Path("results/s"), exit_code=exit_code)
    summary = SimpleNamespace(best_id=best_id, text="one screen", facts={"outcome": "better"})
    monkeypatch.setattr("higgs_tune.sweep.driver.run_sweep", lambda *_, **__: outcome)
    monkeypatch.setattr("higgs_tune.report.build.build_report", lambda _: summary)
    return cli.main(["sweep", "--name", "s"])


@pytest.mark.parametrize(
    ("search", "best_id", "code"), [(0, "t003", 0), (0, None, 3), (3, None, 3), (130, None, 130)]
)
def test_exit_code_is_3_without_a_best_configuration(monkeypatch, search, best_id, code):
    assert ended(monkeypatch, exit_code=search, best_id=best_id) == code


def test_outside_a_terminal_the_summary_is_an_event_and_its_text_goes_to_stderr(
    monkeypatch, capsys
):
    ended(monkeypatch, exit_code=0, best_id="t003")
    output, errors = capsys.readouterr()
    event = json.loads(output)
    assert (event["event"], event["outcome"]) == ("summary", "better")
    assert errors == "one screen\n"


@pytest.mark.parametrize(
    ("end", "code"),
    [(lambda: signal.raise_signal(signal.SIGINT), 130), (lambda: sys.exit(signal.SIGTERM), 143)],
    ids=["Ctrl-C", "Ray's handler of SIGTERM"],
)
def test_a_signal_while_ray_starts_ends_the_sweep_at_once(monkeypatch, tmp_path, capsys, end, code):
    def join(*_, **__):
        end()
        raise AssertionError("it went on")

    monkeypatch.setattr("higgs_tune.sweep.driver.join_cluster", join)
    assert cli.main(["sweep", "--set", f"results_dir={tmp_path}"]) == code
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line_that_names_the_next_command(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr("higgs_tune.report.build.build_report", full)
    assert cli.main(["report", "results/s"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device: 'report.html'" in error
    assert "`higgs-tune report DIR`" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("export_cli", ["export", "a", "--out", "b"]),
        ("train_cli", ["train", "--config", "c.yaml"]),
        ("prepare_cli", ["data", "prepare", "m.csv", "--out", "b"]),
    ],
)
def test_an_os_error_outside_a_sweep_does_not_mention_sweeps(
    monkeypatch, capsys, module, arguments
):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error", "somewhere")

    monkeypatch.setattr(getattr(cli, module), "run", fail)
    assert cli.main(arguments) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 5] Input/output error: 'somewhere'. ")
    assert "run the command again" in error
    assert "sweep" not in error and "report" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_a_command_without_memory_ends_with_one_line(monkeypatch, capsys, kind):
    def fail(*_, **__):
        raise kind("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("higgs_tune.listen.run.run_evaluation", fail)
    monkeypatch.setattr("higgs_tune.files.replace_folder", lambda folder, write: write(folder))
    assert cli.main(["evaluate", "--adapter", "none", "--out", "nowhere"]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: not enough memory: CUDA out of memory. Tried to allocate 2.00")
    assert error.count("\n") == 1


def test_a_failed_folder_copy_reports_only_its_first_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    for name in ("a.json", "b.safetensors"):
        (tmp_path / "adapter" / name).touch()

    def full(source, target, **_):
        raise OSError(errno.ENOSPC, "No space left on device", source)

    def copy(_):
        shutil.copytree(tmp_path / "adapter", tmp_path / "best_adapter", copy_function=full)

    monkeypatch.setattr("higgs_tune.report.build.build_report", copy)
    assert cli.main(["report", "results/s"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 28] No space left on device: ")
    assert error.count("No space left") == 1
    assert "[(" not in error


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        (
            "base.path=someone/model",
            "base.revision: not set for Hub id someone/model (there is no such folder here)",
        ),
        ("base.path=./nowhere", "base.path: ./nowhere does not exist"),
        ("data.path=nowhere", "nowhere: found no dataset.json"),
        ("data.path=embedded:klingon", "no such embedded dataset"),
    ],
)
def test_an_impossible_base_or_data_is_refused_before_ray_starts(
    tmp_path, capsys, monkeypatch, setting, error
):
    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr("higgs_tune.sweep.driver.join_cluster", started)
    place = ("--set", f"results_dir={tmp_path}", "--set", setting)
    assert cli.main(["sweep", *place]) == cli.BAD_INPUT
    assert error in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_of_a_cluster_is_not_looked_for_on_this_machine(tmp_path, monkeypatch):
    class Joined(Exception):
        pass

    def join(*_, **__):
        raise Joined

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("higgs_tune.sweep.driver.join_cluster", join)
    with pytest.raises(Joined):
        cli.main(["sweep", "--set", f"results_dir={tmp_path}", "--set", "data.path=/nowhere"])


@pytest.mark.parametrize(
    ("arguments", "dtype", "device"),
    [
        ([], "float32", "auto"),
        (["--dtype", "bfloat16", "--device", "cpu"], "bfloat16", "cpu"),
    ],
)
def test_check_loads_the_base_with_the_given_dtype_and_device(
    monkeypatch, capsys, arguments, dtype, device
):
    def load(base, *_):
        assert (base.dtype, base.device) == (dtype, device)
        return SimpleNamespace(preflight={}, base_metrics={})

    monkeypatch.setattr("higgs_tune.train.loop.PackLoop.load", load)
    assert cli.main(["check", *arguments]) == 0
    assert cli.main(["check", "--dtype", "float8"]) == cli.BAD_INPUT
    assert "dtype: Input should be 'float32' or 'bfloat16'" in capsys.readouterr().err
    assert cli.main(["check", "--data", "s3://bucket/x"]) == cli.BAD_INPUT
    assert "path: s3://bucket/x is an address, needed a path" in capsys.readouterr().err


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m higgs_tune", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("higgs_tune", run_name="__main__")
    assert capsys.readouterr().out.startswith("higgs-tune ")


def test_a_progress_bar_of_instant_work_is_not_drawn(tmp_path):
    code = (
        "import sys; from higgs_tune.cli import main; main(sys.argv[1:]); "
        "from tqdm import tqdm; list(tqdm(range(9)))"
    )
    command = [sys.executable, "-c", code, "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_character_that_the_terminal_lacks_is_replaced(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="latin-1") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit, match="0"):
            cli.main(["--version"])
        print("gain –", flush=True)
    assert (tmp_path / "out").read_text(encoding="latin-1").endswith("gain ?\n")


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch, capsys):
    def version(package):
        raise cli.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(cli.importlib.metadata, "version", version)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "higgs-tune of a checkout that is not installed\n"


@pytest.mark.parametrize("code", [0, 130, 143])
def test_an_interrupted_sweep_says_how_to_resume_it(monkeypatch, tmp_path, capsys, code):
    outcome = SimpleNamespace(results=tmp_path / "quick-2", exit_code=code)
    monkeypatch.setattr("higgs_tune.sweep.driver.run_sweep", lambda *_, **__: outcome)
    summary = SimpleNamespace(best_id="t001")
    monkeypatch.setattr("higgs_tune.report.build.build_report", lambda _: summary)
    monkeypatch.setattr(cli, "_show_summary", lambda _: None)
    assert cli.main(["sweep", "--set", f"results_dir={tmp_path}"]) == code
    told = "--resume --name quick-2" in capsys.readouterr().err
    assert told == (code != 0)
