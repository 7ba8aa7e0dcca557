"""How a trial finds its worker."""

import errno
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext

from higgs_tune.errors import SweepError
from higgs_tune.sweep import space, trainable
from higgs_tune.sweep.records import metrics_of
from higgs_tune.sweep.seats import SITS_AT

NOT_READY = object()  # no process yet (Ray queues the call), or one that still loads
CALLS = ("ready", "join")


class Clock:
    """Time that passes only in `sleep`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def trial(make_config, monkeypatch, answers) -> tuple[trainable.PackTrial, Clock]:
    """A trial whose workers w0 and w1 answer `answers(name, time)`: a lease, an error, or NOT_READY."""
    clock = Clock()

    def get(call):
        name, what = call
        answer = answers(name, clock.now)
        assert answer is not NOT_READY, "it waits for ever"
        if isinstance(answer, Exception):
            raise answer
        return None if what == "ready" else answer

    def wait(calls, timeout):
        end = clock.now + timeout
        while not (done := [c for c in calls if answers(c[0], clock.now) is not NOT_READY]):
            if clock.now >= end:
                break
            clock.sleep(min(0.5, end - clock.now))
        return done, [c for c in calls if c not in done]

    def get_actor(name):
        calls = {what: SimpleNamespace(remote=lambda *_, w=what: (name, w)) for what in CALLS}
        return SimpleNamespace(name=name, **calls)

    monkeypatch.setattr(trainable, "time", clock)
    monkeypatch.setattr(trainable.ray, "get", get)
    monkeypatch.setattr(trainable.ray, "wait", wait)
    monkeypatch.setattr(trainable.ray, "get_actor", get_actor)
    config = make_config()
    raw = space.resolve(space.baseline_values(config, fixed_flag=False), config, 5).model_dump()
    made = object.__new__(trainable.PackTrial)
    made.config = {
        "worker": 1,
        "workers": ["w0", "w1"],
        "trial": raw,
        "roster_version": 1,
        "attempt": 1,
    }
    made._trial_id, made._name = "t000", "t000"
    return made, clock


def test_a_free_slot_elsewhere_is_taken(make_config, monkeypatch):
    made, _ = trial(
        make_config, monkeypatch, lambda name, now: "seated" if name == "w0" else "full"
    )
    worker, place = made._lease(None)
    assert (worker.name, place) == ("w0", 0)


def reporting(make_config, monkeypatch, result) -> trainable.PackTrial:
    """A trial whose worker reports a result."""
    made, _ = trial(make_config, monkeypatch, lambda name, now: None)
    call = SimpleNamespace(remote=lambda trial_id: ("w0", "next_result"))
    made._worker = SimpleNamespace(next_result=SimpleNamespace(options=lambda name: call))
    made._sits_at = 0
    monkeypatch.setattr(trainable.ray, "get", lambda call: dict(result))
    return made


@pytest.mark.parametrize("status", ["diverged", "out_of_memory", "failed"])
def test_a_trial_that_ended_badly_has_no_metric_for_a_scheduler(make_config, monkeypatch, status):
    """NaN is neither below nor above any cutoff."""
    result = {"status": status, "val/text/nll": math.nan, "reason": "NaN"}
    made = reporting(make_config, monkeypatch, result)
    assert made.step() == {"status": status, "reason": "NaN", SITS_AT: 0, "done": True}


def test_a_result_names_the_trials_worker_and_its_metrics_do_not(make_config, monkeypatch):
    result = {"status": "running", "val/text/nll": 2.5}
    made = reporting(make_config, monkeypatch, result)
    assert made.step() == {**result, SITS_AT: 0, "done": False}
    assert metrics_of(made.step()) == {"val/text/nll": 2.5}


@pytest.mark.parametrize("other", [NOT_READY, "away", "full", RayActorError()])
def test_a_worker_that_takes_no_trials_does_not_block_the_others(make_config, monkeypatch, other):
    made, clock = trial(
        make_config, monkeypatch, lambda name, now: "seated" if name == "w0" else other
    )
    assert made._lease(None)[0].name == "w0"
    assert clock.now <= 15


def test_the_worker_that_is_ready_first_is_taken_at_once(make_config, monkeypatch):
    ready_at = {"w0": 400.0, "w1": 7200.0}
    made, clock = trial(
        make_config,
        monkeypatch,
        lambda name, now: "seated" if now >= ready_at[name] else NOT_READY,
    )
    assert made._lease(None)[0].name == "w0"
    assert 400 <= clock.now < 401


def test_the_wait_for_a_slot_counts_from_when_a_worker_is_ready(make_config, monkeypatch):
    made, clock = trial(
        make_config, monkeypatch, lambda name, now: "full" if now >= 300 else NOT_READY
    )
    with pytest.raises(SweepError, match="no worker had a free slot for 120 s"):
        made._lease(None)
    assert 420 <= clock.now < 422


def test_workers_that_stay_full_end_the_attempt(make_config, monkeypatch):
    made, clock = trial(make_config, monkeypatch, lambda name, now: "full")
    with pytest.raises(SweepError, match="no worker had a free slot for 120 s"):
        made._lease(None)
    assert 120 <= clock.now < 122


@pytest.mark.parametrize("error", [RayActorError(), ValueError("no such actor")])
def test_a_worker_that_is_away_is_waited_for(make_config, monkeypatch, caplog, error):
    made, clock = trial(
        make_config, monkeypatch, lambda name, now: error if now < 600 else "seated"
    )
    assert made._lease(None)[0].name == "w1"
    assert clock.now >= 600  # five times as long as a slot is waited for
    reminders = [line for line in caplog.messages if line == "t000 waits for w1, w0"]
    assert 8 <= len(reminders) <= 10


def test_after_a_reset_an_error_is_raised_by_the_new_trials_calls(make_config, monkeypatch):
    made, _ = trial(make_config, monkeypatch, lambda name, now: "full")
    config = {**made.config, "id": "t001", "name": "t001", "restore_from": ""}
    made.config = config
    assert made.reset_config(config)
    for call in (
        made.step,
        lambda: made.load_checkpoint("anywhere"),
        lambda: made.save_checkpoint("anywhere"),
    ):
        with pytest.raises(SweepError, match="t001: no worker had a free slot"):
            call()


def test_a_reset_waits_for_no_slot(make_config, monkeypatch):
    """Tune gives a trial up at once if its process dies during a reset."""
    made, clock = trial(
        make_config, monkeypatch, lambda name, now: "seated" if now >= 300 else NOT_READY
    )
    made.config = {**made.config, "id": "t001", "name": "t001", "restore_from": ""}
    assert made.reset_config(made.config)
    assert clock.now == 0
    made._sit_down()
    assert clock.now >= 300 and made._worker.name == "w1"


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_needs_no_room_beside_the_results_and_leaves_nothing(
    tmp_path, monkeypatch, fails
):
    def save_checkpoint(self, folder):
        Path(folder, "adapter.bin").write_bytes(b"0")
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no-such-folder"))
    monkeypatch.setattr(trainable.PackTrial, "save_checkpoint", save_checkpoint)
    made = object.__new__(trainable.PackTrial)
    made._storage = StorageContext(str(tmp_path), "search", trial_dir_name="t000")
    made._last_result = {}
    with pytest.raises(OSError, match="No space") if fails else nullcontext():
        assert made.save().checkpoint.path == str(tmp_path / "search/t000/checkpoint_000000")
    left = {path.name for path in tmp_path.rglob("*") if path.name != ".validate_storage_marker"}
    saved = {"t000", "checkpoint_000000", "adapter.bin"}
    assert left == {"search"} | (set() if fails else saved)
