"""Two training runs in one folder."""

import errno
import fcntl
import os

import pytest

from higgs_tune.errors import ConfigError
from higgs_tune.train import single
from tests.runs import assert_same_run


def test_a_folder_in_which_a_run_is_training_cannot_be_resumed(run_single, uninterrupted):
    run, _, out = run_single

    def again(step):
        if step == 3:
            with pytest.raises(ConfigError, match=r"out: a run is training here. Wait for its end"):
                run(resume=True)

    assert run(on_step=again)["status"] == "completed"
    assert_same_run(out, uninterrupted)
    assert run(resume=True)["status"] == "completed"


def test_of_two_new_runs_in_one_folder_only_the_first_to_load_writes_there(
    run_single, uninterrupted, monkeypatch
):
    run, _, out = run_single
    load = single.load_base

    def meanwhile(settings):
        monkeypatch.setattr(single, "load_base", load)
        assert run()["status"] == "completed"
        return load(settings)

    monkeypatch.setattr(single, "load_base", meanwhile)
    with pytest.raises(ConfigError, match=r"out: not empty. Give another --out"):
        run()
    assert_same_run(out, uninterrupted)


def test_a_file_system_without_locks_causes_a_warning(
    run_single, uninterrupted, monkeypatch, caplog
):
    def no_lock(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    run, _, out = run_single
    monkeypatch.setattr(fcntl, "flock", no_lock)
    assert run()["status"] == "completed"
    assert f"{out}: this file system cannot lock a folder (No locks available)" in caplog.text
    assert_same_run(out, uninterrupted)
