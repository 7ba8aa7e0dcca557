"""A sweep whose Ray ends before it does, and signals that Ray would catch."""

import json
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from higgs_tune.cluster import Cluster
from higgs_tune.errors import ConfigError, SweepError
from higgs_tune.sweep import driver, nodes, search
from higgs_tune.sweep import study as studies
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.records import TrialFiles

RESULTS = Path("results/quick-2")


@pytest.fixture
def watched(monkeypatch):
    """Watches a Ray that has died; gives the Control, an event set at the exit, and the exit codes."""
    ended = threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(driver.os, "_exit", leave)
    monkeypatch.setattr(driver, "GRACE_WITHOUT_RAY_S", 0.0)
    cluster = Cluster(is_own=True, complete=str, has_died=lambda: True)
    control, display = Control(), SimpleNamespace(close=lambda: None)
    with driver._exit_if_ray_died(cluster, control, display, RESULTS):
        yield control, ended, codes


def test_a_signal_that_also_ended_ray_ends_the_sweep_and_says_how_to_go_on(watched, capfd):
    control, ended, codes = watched
    control.request.number = 15
    assert ended.wait(10)
    assert codes == [143]
    error = capfd.readouterr().err
    assert "`higgs-tune report results/quick-2`" in error
    assert "--resume --name quick-2" in error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_sweep_ends_even_if_its_message_cannot_be_printed(watched, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    control, ended, _ = watched
    monkeypatch.setattr(driver, "print", gone, raising=False)
    control.request.number = 15
    assert ended.wait(10)


def test_the_end_of_ray_without_a_signal_is_an_error_of_the_sweep(watched, capfd):
    control, ended, codes = watched
    assert ended.wait(10)
    assert codes[0] == 2
    assert str(control.error).startswith("Ray has ended on this machine")
    error = capfd.readouterr().err
    assert error.startswith("error: Ray has ended on this machine")
    assert "--resume --name quick-2" in error


@pytest.mark.parametrize(
    ("has_died", "raised", "expected"),
    [
        (True, ValueError("of a call to Ray"), SweepError),
        (True, ConfigError("of its own"), ConfigError),
        (False, ValueError("of a defect"), ValueError),
    ],
)
def test_an_error_is_blamed_on_ray_if_it_has_died(has_died, raised, expected):
    cluster = Cluster(is_own=True, complete=str, has_died=lambda: has_died)
    display = SimpleNamespace(close=lambda: None)
    with (
        pytest.raises(expected) as caught,
        driver._exit_if_ray_died(cluster, Control(), display, RESULTS),
    ):
        raise raised
    assert caught.value is raised or caught.value.__cause__ is raised


def test_an_error_of_a_ray_that_a_signal_ended_is_no_error_of_the_sweep():
    cluster = Cluster(is_own=True, complete=str, has_died=lambda: True)
    control, display = Control(), SimpleNamespace(close=lambda: None)
    control.request.number = 2
    with driver._exit_if_ray_died(cluster, control, display, RESULTS):
        raise ValueError("of a call to Ray")
    assert control.error is None


def test_no_machine_is_left_once_ray_has_died(monkeypatch):
    monkeypatch.setattr(nodes, "alive_nodes", list)
    assert "the cluster has 0 CPU, 0 GPU in all" in nodes.shortage("worker-0", 1, 0)


def test_ray_is_watched_until_the_workers_are_gone(monkeypatch, make_config, tmp_path):
    ended = threading.Event()

    @contextmanager
    def join(*args, **kwargs):
        yield Cluster(is_own=False, complete=str, has_died=lambda: True)

    workers = SimpleNamespace(kill=lambda: ended.wait(10))  # as long as Ray would take
    monkeypatch.setattr(driver.os, "_exit", lambda code: ended.set())
    monkeypatch.setattr(driver, "GRACE_WITHOUT_RAY_S", 0.0)
    monkeypatch.setattr(driver, "join_cluster", join)
    monkeypatch.setattr(driver, "idle_gpus", lambda tune: None)
    monkeypatch.setattr(driver, "Workers", lambda *_, **__: workers)
    monkeypatch.setattr(search, "run", lambda *_: signal.raise_signal(signal.SIGTERM))
    outcome = driver._run(make_config(), tmp_path, resume=False, loop_path="none")
    assert outcome.exit_code == 143
    assert ended.is_set()


def test_resuming_with_a_study_that_lacks_trials_of_the_folder_is_refused(
    make_config, tmp_path, record, monkeypatch
):
    monkeypatch.setattr(driver, "join_cluster", lambda _: pytest.fail("nothing may start"))
    config = make_config(tune={"storage": "sqlite:///study.db"})
    TrialFiles(tmp_path).start(record)
    monkeypatch.chdir(tmp_path)  # not where the sweep began
    with pytest.raises(ConfigError, match=r"the study .* lacks t000, .* a relative path"):
        driver._run(config, tmp_path, resume=True, loop_path="none")


def test_a_sweep_is_not_finished_until_the_end_of_each_trial_is_in_its_files(
    make_config, tmp_path, record, study
):
    config = make_config(tune={"num_trials": 1}, confirm={"num_configs": 0})
    entry, files = study.ask(), TrialFiles(tmp_path)
    entry.set_user_attr(studies.RECORD, json.dumps(record.to_dict()))
    entry.set_user_attr(studies.INDEX, 0)
    entry.set_user_attr(studies.STATUS, "diverged")
    study.tell(entry, state=TrialState.PRUNED)
    files.start(record)  # killed before `end`
    assert not driver._is_finished(study, config, files)
    files.end("t000", "diverged", None, None)
    assert driver._is_finished(study, config, files)


def test_sigterm_ends_the_sweep_despite_the_handler_that_ray_sets(
    monkeypatch, make_config, tmp_path
):
    @contextmanager
    def join(*args, **kwargs):
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the handler that Ray sets"))
        yield Cluster(is_own=False, complete=str)

    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(driver, "join_cluster", join)
    monkeypatch.setattr(driver, "idle_gpus", lambda tune: None)
    monkeypatch.setattr(driver, "Workers", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match=str(int(signal.SIGTERM))):
            driver._run(make_config(), tmp_path, resume=False, loop_path="none")
    finally:
        signal.signal(signal.SIGTERM, former)
