"""The driver's callback for a running Tuner, tested without one."""

import errno
import io
import threading
from types import SimpleNamespace

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune import Checkpoint

from higgs_tune.errors import SweepError
from higgs_tune.files import write_json
from higgs_tune.sweep.callback import SweepCallback
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.later import Later
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import CHECKPOINT_INFO, CheckpointError
from higgs_tune.sweep.study import TrialRecord
from tests.workers import trial


def make_callback(results, **parts):
    """A callback whose parts do nothing, except those that are given."""
    nothing = SimpleNamespace()
    return SweepCallback(
        **{
            "results": results,
            "files": nothing,
            "boards": nothing,
            "later": Later(),
            "source": nothing,
            "control": Control(),
            "display": Display(io.StringIO()),
            "num_checkpoints": 1,
            "audio_limit": lambda: 1.0,
            "check_workers": lambda: None,
            "close_workers": lambda: None,
            **parts,
        }
    )


@pytest.fixture
def saved(tmp_path):
    """Saves a trial's checkpoint as Tune does; returns the names of those that are left."""

    def callback_of(num_checkpoints):
        callback = make_callback(tmp_path, num_checkpoints=num_checkpoints)

        def save(trial_id, name):
            record = TrialRecord(trial_id, 0, trial_id, "search", None, trial())
            of_tune = SimpleNamespace(config={"record": record.to_dict()})
            folder = tmp_path / trial_id / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter.bin").write_bytes(b"0")
            callback.on_checkpoint(0, [], of_tune, Checkpoint(str(folder)))
            return sorted(path.name for path in (tmp_path / trial_id).iterdir())

        return save

    return callback_of


def test_only_the_newest_checkpoints_of_each_trial_are_kept(saved):
    save = saved(2)
    assert save("t0", "c0") == ["c0"]
    assert save("t1", "c0") == ["c0"]
    assert save("t0", "c1") == ["c0", "c1"]
    assert save("t0", "c2") == ["c1", "c2"]
    assert save("t1", "c1") == ["c0", "c1"]


def test_a_checkpoint_that_a_restarted_trial_writes_again_is_kept(saved):
    save = saved(1)
    save("t0", "c0")
    save("t0", "c1")
    assert save("t0", "c1") == ["c1"]
    assert save("t0", "c0") == ["c0"]  # after a failure Tune may restart at an earlier number
    assert save("t0", "c1") == ["c1"]


def test_tune_waits_for_the_disk_only_at_a_trials_end(tmp_path):
    disk, done = threading.Event(), []

    def slow(trial_id, source):
        assert disk.wait(30)
        done.append(source.name)

    files = SimpleNamespace(
        checkpoint=slow, end=lambda *ending: done.append("end"), result=lambda *_: None
    )
    boards = SimpleNamespace(update=lambda _: None, end=lambda _: None)
    callback = make_callback(tmp_path, files=files, boards=boards)
    record = TrialRecord("t0", 0, "t0", "search", None, trial())
    of_tune = SimpleNamespace(config={"record": record.to_dict()})
    callback._display.board.start(record, 0, {})
    callback._last["t0"] = {}
    for number, status in enumerate(("running", "completed")):
        folder = tmp_path / f"c{number}"
        folder.mkdir()
        (folder / CHECKPOINT_INFO).write_text("{}")
        callback.on_trial_result(0, [], of_tune, {"status": status, "step": number})
        if status == "completed":
            threading.Timer(0.1, disk.set).start()
        callback.on_checkpoint(0, [], of_tune, Checkpoint(str(folder)))
        assert done == ([] if status == "running" else ["c0", "c1"])
    callback.on_trial_complete(0, [], of_tune)
    assert done == ["c0", "c1", "end"]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # Tune's own are deleted


def test_a_trial_whose_last_adapter_cannot_be_stored_is_not_completed(tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    ended, cancelled = [], []
    callback = make_callback(
        tmp_path,
        files=SimpleNamespace(checkpoint=full, end=lambda *end: ended.append(end[:2])),
        boards=SimpleNamespace(end=lambda _: None),
        source=SimpleNamespace(stop=lambda: None, cancel_live=cancelled.append),
    )
    record = TrialRecord("t0", 0, "t0", "search", None, trial())
    of_tune = SimpleNamespace(config={"record": record.to_dict()})
    callback._last["t0"] = {"status": "completed", "step": 150}
    write_json(tmp_path / "c0" / CHECKPOINT_INFO, {"step": 150})
    callback.on_checkpoint(0, [], of_tune, Checkpoint(str(tmp_path / "c0")))
    assert len(cancelled) == 1  # in the study, before Tune tells it that the trial is complete
    callback.on_trial_complete(0, [], of_tune)
    assert ended == [("t0", "cancelled")]


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "{results}: cannot be written"),
        (CheckpointError("node-7 cannot write to /tmp: No space left on device"), "node-7 cannot"),
    ],
)
def test_a_full_disk_in_a_trials_or_workers_process_ends_the_sweep(tmp_path, error, place):
    control, ended = Control(), []
    callback = make_callback(
        tmp_path,
        files=SimpleNamespace(end=lambda *ending: ended.append(ending)),
        boards=SimpleNamespace(end=lambda _: None),
        control=control,
    )
    (tmp_path / "error.pkl").write_bytes(cloudpickle.dumps(RayTaskError("save", "", error)))
    record = TrialRecord("t0", 0, "t0", "search", None, trial())
    callback.on_trial_error(
        0,
        [],
        SimpleNamespace(
            config={"record": record.to_dict()}, pickled_error_file=str(tmp_path / "error.pkl")
        ),
    )
    assert isinstance(control.error, SweepError)
    assert str(control.error).startswith(place.format(results=tmp_path))
    assert "No space left on device" in str(control.error)
    assert ended[0][:2] == ("t0", "cancelled")
    assert f"{type(error).__name__}: {error}" in ended[0][2]


@pytest.fixture
def resumed(tmp_path, record):
    """Starts a trial that had reported twice and saved once; returns the callback."""
    files = TrialFiles(tmp_path)
    files.start(record)
    for step in (25, 50):
        files.result(record.trial_id, {"step": step, "val/text/nll": 3.0 - step / 100})
    adapter = files.folder(record.trial_id) / "adapter"
    adapter.mkdir()
    write_json(adapter / CHECKPOINT_INFO, {"step": 25})  # step 50 is trained again

    def start():
        callback = make_callback(tmp_path, files=files)
        callback.on_trial_start(0, [], SimpleNamespace(config={"record": record.to_dict()}))
        return callback

    return start


def test_a_resumed_trial_is_shown_with_its_metrics_at_the_checkpoint(resumed, record):
    row = resumed()._display.board.rows[record.trial_id]
    assert (row.step, row.last["val/text/nll"]) == (25, 2.75)


def test_a_damaged_metrics_file_of_a_resumed_trial_ends_the_sweep(resumed, tmp_path):
    (tmp_path / "trials" / "t000" / "metrics.jsonl").write_text("{}}\n")
    assert "metrics.jsonl, line 1: not JSON" in str(resumed()._control.error)
