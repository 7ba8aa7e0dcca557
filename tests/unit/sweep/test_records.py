import errno
import json
import math
from dataclasses import replace

import pytest

from higgs_tune.errors import DataError
from higgs_tune.files import former, read_json_lines
from higgs_tune.sweep import records
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import CHECKPOINT_INFO


def checkpoint(folder, step):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_text(f"weights {step}")
    (folder / CHECKPOINT_INFO).write_text(json.dumps({"trial_id": "t000", "step": step}))
    return folder


def steps(results):
    return [line["step"] for line in read_json_lines(results / "trials/t000/metrics.jsonl")]


def test_a_trial_leaves_config_metrics_status_and_adapter(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    files.result("t000", {"step": 25, "val/text/nll": 2.0, "account": {"parameters": 7}})
    files.result("t000", {"step": 50, "val/text/nll": 1.5, "done": True, "pid": 4})
    files.checkpoint("t000", checkpoint(tmp_path / "c1", 25))
    files.checkpoint("t000", checkpoint(tmp_path / "c2", 50))
    files.end("t000", "completed", None, True)
    folder = tmp_path / "trials" / "t000"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "config.json",
        "metrics.jsonl",
        "status.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["account"] == {"parameters": 7}
    assert config["config"] == record.config.model_dump(mode="json")
    assert config["name"] == "t000 r16 lr1.0e-04 off all_linear"
    assert read_json_lines(folder / "metrics.jsonl") == [
        {"step": 25, "val/text/nll": 2.0},
        {"step": 50, "val/text/nll": 1.5},
    ]
    status = files.status("t000")
    assert status is not None
    assert status.pop("wall_s") >= 0
    assert status == {"status": "completed", "reason": None, "step": 50, "feasible": True}
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "weights 50"


def test_a_resumed_trial_drops_metrics_beyond_its_checkpoint(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    for step in (25, 50):
        files.result("t000", {"step": step, "val/text/nll": 2.0})
    files.checkpoint("t000", checkpoint(tmp_path / "c1", 25))
    with (tmp_path / "trials/t000/metrics.jsonl").open("a") as file:
        file.write('{"step": 75, "val/te')  # the process was killed here
    again = TrialFiles(tmp_path)
    assert again.checkpoint_of("t000") == (tmp_path / "trials/t000/adapter", 25)
    again.start(record)
    assert steps(tmp_path) == [25]


def test_a_last_step_reported_again_after_a_kill_is_recorded_once(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    files.result("t000", {"step": 150, "val/text/nll": 2.0})
    files.checkpoint("t000", checkpoint(tmp_path / "c1", 150))
    again = TrialFiles(tmp_path)
    again.start(record)
    again.result("t000", {"step": 150, "val/text/nll": 2.0, "status": "completed"})
    assert steps(tmp_path) == [150]


def test_the_former_checkpoint_is_used_after_a_crash_while_replacing_it(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    files.checkpoint("t000", checkpoint(tmp_path / "c1", 25))
    adapter = tmp_path / "trials/t000/adapter"
    adapter.rename(former(adapter))
    assert files.checkpoint_of("t000") == (former(adapter), 25)


def test_wall_time_of_earlier_runs_is_kept(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    files.end("t000", "cancelled", "interrupted", None)
    path = tmp_path / "trials/t000/status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "wall_s": 100.0}))
    again = TrialFiles(tmp_path)
    again.start(record)
    assert again.status("t000") is None  # while it runs
    again.end("t000", "completed", None, True)
    assert again.status("t000")["wall_s"] >= 100.0


@pytest.mark.parametrize(
    ("status", "kept"), [("cancelled", True), ("completed", True), ("pruned", False)]
)
def test_a_pruned_trial_keeps_no_optimizer_moments(tmp_path, record, status, kept):
    files = TrialFiles(tmp_path)
    files.start(record)
    source = checkpoint(tmp_path / "c1", 25)
    (source / "training_state.safetensors").write_bytes(b"moments")
    (source / "adapter_model.safetensors").write_bytes(b"weights")
    files.checkpoint("t000", source)
    files.end("t000", status, None, None)
    adapter = tmp_path / "trials/t000/adapter"
    assert (adapter / "training_state.safetensors").exists() == kept
    assert (adapter / "adapter_model.safetensors").exists()


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path, record):
    files = TrialFiles(tmp_path)
    files.start(record)
    files.result("t000", {"step": 1, "val/text/nll": math.nan, "x": math.inf, "status": "no"})
    (line,) = (tmp_path / "trials/t000/metrics.jsonl").read_text().splitlines()
    assert line == '{"step": 1, "val/text/nll": null, "x": null}'


def test_a_damaged_metrics_line_is_named_in_the_error(tmp_path, record):
    TrialFiles(tmp_path).start(record)
    (tmp_path / "trials/t000/metrics.jsonl").write_text('{"step": 25}\n{"step" 50}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not JSON"):
        TrialFiles(tmp_path).start(record)


def test_a_checkpoint_that_fills_the_disk_leaves_the_former_one(tmp_path, monkeypatch):
    files = TrialFiles(tmp_path)
    files.checkpoint("t000", checkpoint(tmp_path / "c1", 25))

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "_link_or_copy", full)
    with pytest.raises(OSError, match="No space left"):
        files.checkpoint("t000", checkpoint(tmp_path / "c2", 50))
    folder = tmp_path / "trials" / "t000"
    assert files.checkpoint_of("t000") == (folder / "adapter", 25)
    assert [path.name for path in folder.iterdir()] == ["adapter"]


def test_a_copy_continues_from_its_donors_step_even_if_it_was_further(tmp_path, record):
    files, donor = TrialFiles(tmp_path), replace(record, trial_id="t001", number=1)
    for one, steps in ((record, (25, 50, 75)), (donor, (25, 50))):
        files.start(one)
        for step in steps:
            files.result(one.trial_id, {"step": step, "val/text/nll": float(step)})
    files.checkpoint("t001", checkpoint(tmp_path / "c1", 50))
    files.copied(record, "t001")
    files.result("t000", {"step": 75, "val/text/nll": 1.0})
    lines = read_json_lines(tmp_path / "trials" / "t000" / "metrics.jsonl")
    assert [(line["step"], line["val/text/nll"]) for line in lines] == [(25, 25), (50, 50), (75, 1)]
