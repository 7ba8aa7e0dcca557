"""The arguments of `higgs-tune train`."""

import argparse

import pytest
import yaml

from higgs_tune.errors import ConfigError
from higgs_tune.report.build import build_report
from higgs_tune.train import train_cli
from tests.unit.report.builder import Builder, curve, realistic, sweep_config, trial_config

BEST = {
    "higgs_tune": {"version": "0"},
    "base": {"path": "embedded"},
    "data": {"path": "embedded:arabic", "content_hash": "abc"},
    "trial": {
        "rank": 4,
        "alpha": 32.0,
        "targets": ["attention"],
        "learning_rate": 1e-3,
        "num_steps": 20,
        "report_every_steps": 5,
    },
    "results": {"note": "better"},
}


@pytest.fixture
def read(tmp_path):
    def settings(*arguments: str, content=BEST):
        path = tmp_path / "best_config.yaml"
        path.write_text(yaml.safe_dump(content))
        parser = argparse.ArgumentParser()
        train_cli.add_arguments(parser)
        return train_cli.read_settings(parser.parse_args(["--config", str(path), *arguments]))

    return settings


def test_a_best_config_needs_no_run_section(read):
    settings, content_hash = read()
    assert content_hash == "abc"
    assert settings["trial"].num_steps == 20
    assert settings["run"].early_stop_patience is None
    assert settings["run"].gradient_accumulation_steps == 1


def test_any_setting_can_be_overridden(read):
    settings, _ = read(
        *("--set", "run.save_every_steps=7", "--set", "base.dtype=bfloat16"),
        *("--set", "trial.learning_rate=1e-4", "--data", "elsewhere", "--seed", "9"),
    )
    assert settings["run"].save_every_steps == 7
    assert settings["base"].dtype == "bfloat16"
    assert (settings["trial"].learning_rate, settings["trial"].seed) == (1e-4, 9)
    assert settings["data"].path == "elsewhere"


def test_start_from_is_both_an_argument_and_a_setting(read):
    in_file = BEST | {"run": {"start_from": "old/adapter", "num_samples": 2}}
    assert read(content=in_file)[0]["run"].start_from == "old/adapter"
    settings, _ = read("--start-from", "new/adapter", content=in_file)
    assert (settings["run"].start_from, settings["run"].num_samples) == ("new/adapter", 2)
    with pytest.raises(ConfigError, match=r"run.start_from: .*s3://bucket/a is an address"):
        read("--start-from", "s3://bucket/a")


def test_a_run_section_is_read_and_overridden(read):
    settings, _ = read("--set", "run.num_samples=0", content=BEST | {"run": {"num_samples": 2}})
    assert settings["run"].num_samples == 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("rum.num_samples=1", r"unknown section 'rum', did you mean 'run'\?"),
        ("run.num_sample=1", r"num_sample: unknown setting, did you mean 'num_samples'\?"),
        ("run.early_stop_patience=0", r"early_stop_patience: .*greater than or equal to 1"),
        ("num_samples", r"unknown section 'num_samples'"),
        ("data=recordings", r"data: Input should be a section with path, .*found 'recordings'"),
        ("trial=9", r"yaml:\n  trial: Input should be a section with rank, .*found 9"),
        ("data=", r"data: Input should be a section with path, .*found None"),
        ("base.revision=1234567", r"base\.revision: .* with --set 'base\.revision="),
    ],
)
def test_a_mistaken_setting_is_named(read, argument, message):
    for more in ([], ["--seed", "1"]):
        with pytest.raises(ConfigError, match=message):
            read("--set", argument, *more)


def test_a_file_without_a_trial_is_refused(read):
    with pytest.raises(ConfigError, match="section trial is missing"):
        read(content={"base": {}, "data": {}})


def test_the_yaml_of_a_sweep_is_recognised(read):
    with pytest.raises(
        ConfigError, match=r"holds a sweep, .* higgs-tune sweep --config \S+\.yaml\."
    ):
        read(content={"name": "quick", "space": {"rank": [4]}})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "runs",
            r"unknown section 'runs', did you mean 'run'\?; known here: base, data, trial, run\.",
        ),
        ("train", r"best_config.yaml: unknown section 'train', did you mean 'trial'"),
        (3, r"unknown section 3; known"),
    ],
)
def test_a_section_that_would_be_ignored_is_refused(read, name, message):
    with pytest.raises(ConfigError, match=message):
        read(content=BEST | {name: {"num_steps": 9}})


def test_every_section_that_a_sweep_writes_is_known(read, tmp_path):
    realistic(tmp_path / "quick")
    build_report(tmp_path / "quick")
    content = yaml.safe_load((tmp_path / "quick" / "best_config.yaml").read_text())
    assert set(content) == {*train_cli.SECTIONS, *train_cli.RECORDS}
    assert read(content=content)[1] == "c0ffee"


def test_the_audio_tolerance_of_the_sweep_applies_unless_another_is_set(read, tmp_path):
    config = trial_config()
    sweep = sweep_config(objective={"audio_tolerance": 0.2}, confirm={"num_configs": 0})
    rows = curve(config, 3.0, 0.4, 3.93 * 1.1, 150)
    Builder(tmp_path / "quick", sweep).start().trial("t000", config, rows, origin="baseline")
    build_report(tmp_path / "quick")
    content = yaml.safe_load((tmp_path / "quick" / "best_config.yaml").read_text())
    assert read(content=content)[0]["run"].audio_tolerance == 0.2
    settings, _ = read("--set", "run.audio_tolerance=0.01", content=content)
    assert settings["run"].audio_tolerance == 0.01


@pytest.fixture
def end_with(tmp_path, monkeypatch):
    """Runs the command with a stub of the training; returns the exit code and `--out`."""

    def end(result: dict, *folders: str):
        def train(*_, out, **__):
            for name in folders:
                (out / name).mkdir(parents=True)
            return result

        monkeypatch.setattr("higgs_tune.train.single.train_single", train)
        path, out = tmp_path / "best_config.yaml", tmp_path / "trained"
        path.write_text(yaml.safe_dump(BEST))
        parser = argparse.ArgumentParser()
        train_cli.add_arguments(parser)
        arguments = ["--config", str(path), "--out", str(out), "--set", "run.audio_tolerance=0.1"]
        return train_cli.run(parser.parse_args(arguments)), out

    return end


@pytest.mark.parametrize("has_best", [True, False])
def test_a_run_ends_by_printing_where_its_adapters_are(end_with, capsys, has_best):
    folders = ["adapter", "best_adapter"] if has_best else ["adapter"]
    code, out = end_with({"status": "completed"}, *folders)
    assert code == 0
    adapter, best = capsys.readouterr().out.splitlines()[-2:]
    assert adapter == f"adapter: {out / 'adapter'}"
    assert best.startswith(
        f"best adapter: {out / 'best_adapter' if has_best else 'none: no report'}"
    )
    assert has_best or "run.audio_tolerance (0.1)" in best


def test_a_run_that_diverged_at_once_says_so_and_names_no_adapter(end_with, capsys):
    reason = "a gradient was not finite"
    assert end_with({"status": "diverged", "step": 3, "reason": reason})[0] == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"error: diverged at step 3: {reason}"
    assert "adapter: none: no checkpoint was reached" in printed.out.splitlines()
