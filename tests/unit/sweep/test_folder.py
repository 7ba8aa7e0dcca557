import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from higgs_tune.config_file import load_sweep
from higgs_tune.errors import ConfigError, SweepError
from higgs_tune.sweep import folder as folders
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.driver import run_sweep
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import CHECKPOINT_INFO


def give_result(folder):
    trial = folder / "trials" / "t000"
    trial.mkdir(parents=True)
    (trial / "metrics.jsonl").write_text('{"step": 25}\n')


def opened(config, resume=False):
    with folders.open_folder(config, resume=resume, command=["higgs-tune", "sweep"]) as folder:
        return folder


def test_a_new_folder_holds_the_resolved_settings_and_the_environment(make_config):
    config = make_config()
    folder = opened(config)
    assert load_sweep(folder / "sweep.yaml") == config
    environment = json.loads((folder / "env.json").read_text())
    assert environment["command"] == ["higgs-tune", "sweep"]
    assert environment["versions"]["ray"].startswith("2.")
    assert {"git_sha", "python", "platform", "num_cpus", "gpus", "started_at"} <= set(environment)
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "env.json", "sweep.yaml"]


def test_the_commit_is_given_only_for_tracked_code_and_marks_changes(tmp_path):
    def git(*words):
        who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    module = tmp_path / "__init__.py"
    module.write_text("")
    assert folders.git_sha(tmp_path) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "a")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert folders.git_sha(tmp_path) == commit
    installed = tmp_path / ".venv" / "higgs_tune"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert folders.git_sha(installed) is None
    module.write_text("changed = True\n")
    assert folders.git_sha(tmp_path) == f"{commit}-dirty"
    shutil.rmtree(tmp_path / ".git" / "objects")
    (tmp_path / ".git" / "objects").mkdir()  # cluster.yaml copies a checkout without them
    assert folders.git_sha(tmp_path) == f"{commit}-unchecked"


def test_the_command_is_recorded_without_the_databases_password(make_config):
    command = ["higgs-tune", "sweep", "--set", "tune.storage=postgresql://me:p@ss@host/db"]
    with folders.open_folder(make_config(), resume=False, command=command) as folder:
        environment = json.loads((folder / "env.json").read_text())
    assert environment["command"][-1] == "tune.storage=postgresql://…@host/db"


def test_a_folder_that_holds_a_sweep_is_refused_without_resume(make_config):
    give_result(opened(make_config()))
    with pytest.raises(ConfigError, match=r"already holds a sweep\. Give --resume"):
        opened(make_config())


def test_a_sweep_without_results_leaves_its_name_free(make_config):
    folder = opened(make_config(data={"path": "wrong"}))
    (folder / "trials" / "t000").mkdir(parents=True)
    (folder / "trials" / "t000" / "metrics.jsonl").touch()
    (folder / "study.journal").write_text("of the sweep that failed")
    assert folders.is_free(folder)
    assert opened(make_config()) == folder
    assert load_sweep(folder / "sweep.yaml").data.path != "wrong"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "env.json", "sweep.yaml"]


def test_a_folder_is_not_free_while_a_sweep_runs_or_once_it_has_results(make_config, tmp_path):
    with folders.open_folder(make_config(), resume=False, command=[]) as folder:
        assert not folders.is_free(folder)
    assert folders.is_free(folder)
    give_result(folder)
    assert not folders.is_free(folder)
    (tmp_path / "thesis").mkdir()
    assert not folders.is_free(tmp_path / "thesis")


def test_a_sweep_whose_study_is_in_a_database_keeps_its_name(make_config):
    config = make_config(tune={"storage": "sqlite:///s.db"})
    folder = opened(config)
    assert not folders.is_free(folder)
    with pytest.raises(ConfigError, match="already holds a sweep"):
        opened(config)


def test_a_storage_with_a_study_of_the_same_name_is_refused(make_config, tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    studies.open_study("s", tmp_path, url)
    with pytest.raises(ConfigError, match=r"tune\.storage already holds a study named s"):
        run_sweep(make_config(tune={"storage": url}), resume=False, command=[])
    assert not (tmp_path / "results").exists()


def test_resuming_with_other_settings_names_those_that_differ(make_config):
    opened(make_config())
    other = make_config(train={"num_steps": 60}, objective={"audio_tolerance": 0.5})
    with pytest.raises(ConfigError, match=r"differ: objective.audio_tolerance, train.num_steps"):
        opened(other, resume=True)


def test_a_resumed_sweep_may_have_more_trials_and_other_resources(make_config):
    folder = opened(make_config())
    first = json.loads((folder / "env.json").read_text())
    more = make_config(tune={"num_trials": 99, "num_workers": 2}, confirm={"num_configs": 1})
    assert opened(more, resume=True) == folder
    assert load_sweep(folder / "sweep.yaml").tune.num_trials == 99
    environment = json.loads((folder / "env.json").read_text())
    assert environment["started_at"] == first["started_at"]
    assert len(environment["resumed_at"]) == 1


def test_a_resumed_sweep_may_reach_its_study_at_another_url(make_config):
    folder = opened(make_config(tune={"storage": "postgresql://u:old@db/studies"}))
    moved = "postgresql://u:new@db2/studies"
    assert opened(make_config(tune={"storage": moved}), resume=True) == folder
    assert load_sweep(folder / "sweep.yaml").tune.storage == moved


def test_a_resumed_sweep_may_read_its_data_from_another_path(make_config):
    folder = opened(make_config())
    assert opened(make_config(data={"path": "/moved/here"}), resume=True) == folder
    assert load_sweep(folder / "sweep.yaml").data.path == "/moved/here"
    with pytest.raises(ConfigError, match=r"differ: data.num_val_clips. Set"):
        opened(make_config(data={"path": "/moved/here", "num_val_clips": 3}), resume=True)


def test_resuming_with_other_data_is_refused_and_keeps_the_settings(make_config):
    """A finished sweep starts no worker that would compare the data."""
    folder = opened(make_config())
    (folder / "base.json").write_text('{"content_hash": "0123456789abcdef"}')
    other = make_config(data={"path": "embedded:russian"})
    with pytest.raises(ConfigError, match=r"s: --resume with other data: embedded:russian has .*"):
        run_sweep(other, resume=True, command=["higgs-tune", "sweep"])
    assert load_sweep(folder / "sweep.yaml") == make_config()


def test_a_resumed_sweep_overwrites_no_checkpoint_that_an_adapter_links_to(make_config):
    folder = opened(make_config())
    give_result(folder)
    stored = folder / "ray/search/t000/checkpoint_000000"  # the first one of a run
    stored.mkdir(parents=True)
    (stored / CHECKPOINT_INFO).write_text('{"step": 25}')
    files = TrialFiles(folder)
    files.checkpoint("t000", stored)
    with folders.open_folder(make_config(), resume=True, command=[]):
        stored.mkdir(parents=True, exist_ok=True)
        (stored / CHECKPOINT_INFO).write_text('{"step": ')  # Tune is killed while it writes
    assert files.checkpoint_of("t000") == (folder / "trials/t000/adapter", 25)


def test_a_folder_with_a_running_sweep_is_refused_and_not_changed(make_config):
    config = make_config()
    with folders.open_folder(config, resume=False, command=[]) as folder:
        before = (folder / "sweep.yaml").read_text()
        with pytest.raises(ConfigError, match="a sweep is running here"):
            opened(make_config(tune={"num_trials": 99}), resume=True)
        assert (folder / "sweep.yaml").read_text() == before
    assert opened(config, resume=True) == folder


def test_a_file_system_without_locks_is_one_clear_error(make_config, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"cannot lock a file .Function not.*results_dir=FOLDER"):
        opened(make_config())


def test_a_study_works_on_a_file_system_without_links(make_config, monkeypatch):
    def none(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # as on exFAT and SMB shares

    monkeypatch.setattr(os, "symlink", none)
    monkeypatch.setattr(os, "link", none)
    study = studies.open_study("s", opened(make_config()), None)
    assert study.ask().number == 0


def test_resuming_without_a_sweep_is_refused(make_config):
    with pytest.raises(ConfigError, match="holds no sweep to resume"):
        opened(make_config(), resume=True)


def test_a_folder_with_other_files_is_refused(make_config, tmp_path):
    (tmp_path / "results" / "s").mkdir(parents=True)
    (tmp_path / "results" / "s" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not the folder of a sweep"):
        opened(make_config())


def test_a_results_folder_that_cannot_be_made_is_one_clear_error(make_config, tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(SweepError, match=r"cannot be written .Not a directory.*results_dir"):
        opened(make_config())


def test_a_full_disk_is_found_before_the_sweep_starts(make_config, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    config = make_config()
    folder = Path(config.results_dir, config.name)
    with pytest.raises(SweepError, match="No space left on device"):
        opened(config)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert folders.is_free(folder)
    monkeypatch.undo()
    assert opened(config) == folder
