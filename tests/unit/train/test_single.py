"""A run of one configuration: its folder, how it ends and how it is resumed."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from higgs_tune import metrics
from higgs_tune.config import BaseSettings
from higgs_tune.config_data import TaskMix
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.train import checkpoint, run_folder, single
from tests.models import DATA, make_dataset, tiny_base
from tests.runs import TRIAL, assert_same_run, read_lines


def test_a_run_killed_between_intervals_resumes_where_it_was(run_single):
    run, lines, out = run_single
    with pytest.raises(RuntimeError, match="killed"):
        run(
            report=lambda line: (
                (_ for _ in ()).throw(RuntimeError("killed")) if line["step"] == 10 else None
            )
        )
    with pytest.raises(ConfigError, match="not empty"):
        run()
    assert run(resume=True)["status"] == "completed"
    assert [line["step"] for line in lines] == [15, 20]
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [0, 5, 10, 15, 20]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_resuming_a_finished_run_only_repeats_its_last_line(run_single):
    run, lines, out = run_single
    run()
    lines.clear()
    written = (out / "metrics.jsonl").read_text()
    assert run(resume=True)["status"] == "completed"
    assert [line["step"] for line in lines] == [20]
    assert (out / "metrics.jsonl").read_text() == written


def test_a_resume_with_other_settings_is_refused(run_single):
    run, _, _ = run_single
    run()
    other = TRIAL.model_copy(update={"learning_rate": 0.5, "seed": 9})
    with pytest.raises(ConfigError, match=r"trial.learning_rate was 0.01, now 0.5; trial.seed was"):
        run(resume=True, trial=other)
    with pytest.raises(ConfigError, match=r"data.num_val_clips was 4, now 5"):
        run(resume=True, data=DATA.model_copy(update={"num_val_clips": 5}))


def test_a_checkpoint_that_cannot_be_written_is_a_data_error(run_single, monkeypatch):
    run, lines, out = run_single

    def full_disk(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(DataError, match=r"out: cannot be written: .*No space left.* --resume"):
        run()
    assert [line["step"] for line in lines] == [0]
    assert not list(out.glob(".*")), "a draft takes space that the next start needs"


def test_a_checkpoint_swap_that_stops_halfway_is_mended(run_single, monkeypatch):
    run, lines, out = run_single
    rename = Path.rename

    def failing(path, target):
        if path.name == ".adapter.new" and (out / ".adapter.old").exists():
            raise OSError("the machine stopped")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(DataError, match="the machine stopped"):
            run()
    assert not (out / "adapter").exists()
    assert [line["step"] for line in lines] == [0, 5]
    assert run(resume=True)["status"] == "completed"
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20]


def test_a_figure_that_is_nan_is_null_on_disk(run_single):
    run, lines, out = run_single
    run(data=DATA.model_copy(update={"tasks": TaskMix(transcribe=0)}))
    assert np.isnan(lines[1][metrics.TRAIN_TEXT_NLL])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = (out / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in written]
    assert parsed[1][metrics.TRAIN_TEXT_NLL] is None


def test_an_error_outside_of_writing_keeps_its_type(run_single):
    run, _, _ = run_single

    def broken_pipe(line):
        raise BrokenPipeError("stdout is closed")

    with pytest.raises(BrokenPipeError, match="stdout is closed"):
        run(report=broken_pipe)


def test_a_file_as_out_is_refused(run_single):
    run, _, out = run_single
    out.write_text("notes")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="out: is a file, needed a folder"):
            run(resume=resume)
    assert out.read_text() == "notes"


def test_a_resume_without_a_run_is_refused(run_single):
    run, _, _ = run_single
    with pytest.raises(ConfigError, match=r"no config\.json, so no run to go on with"):
        run(resume=True)


@pytest.mark.parametrize(
    ("number", "at"), [*((signal.SIGTERM, at) for at in (1, 7, 10, 20)), (signal.SIGINT, 7)]
)
def test_a_signal_ends_the_run_after_its_step_and_it_resumes_exactly(
    run_single, uninterrupted, number, at
):
    run, lines, out = run_single
    result = run(on_step=lambda step: os.kill(os.getpid(), number) if step == at else None)
    assert (result["status"], result["step"]) == ("cancelled", at)
    assert result["signal"] == number
    assert checkpoint.read_step(out / "adapter") == at
    assert [line["step"] for line in lines] == list(range(0, at, 5))  # a due validation waits
    assert run(resume=True)["status"] == "completed"
    assert_same_run(out, uninterrupted)


def test_a_signal_before_the_first_step_leaves_a_run_that_resumes(run_single, uninterrupted):
    run, _, out = run_single

    def ended(line):
        os.kill(os.getpid(), signal.SIGTERM)

    assert run(report=ended)["step"] == 0
    assert run(resume=True)["status"] == "completed"
    assert_same_run(out, uninterrupted)


def crash_at(wanted):
    def on_step(step):
        if step == wanted:
            raise RuntimeError("the machine stopped")

    return on_step


def test_a_crashed_run_resumes_from_a_checkpoint_between_validations(run_single, uninterrupted):
    run, lines, out = run_single
    with pytest.raises(RuntimeError, match="the machine stopped"):
        run(save_every_steps=3, on_step=crash_at(14))
    assert checkpoint.read_step(out / "adapter") == 12
    lines.clear()
    assert run(resume=True, save_every_steps=3)["status"] == "completed"
    assert [line["step"] for line in lines] == [15, 20]
    assert_same_run(out, uninterrupted)


def test_a_power_cut_loses_no_line_up_to_the_checkpoint(run_single, uninterrupted, monkeypatch):
    run, _, out = run_single
    fsync, on_disk = os.fsync, {}  # metrics.jsonl as of its last fsync

    def note(handle):
        fsync(handle)
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path == out / "metrics.jsonl":
            on_disk["lines"] = path.read_text()

    def cut(line):
        if line["step"] == 10:
            raise RuntimeError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        with pytest.raises(RuntimeError, match="no power"):
            run(report=cut)
    assert checkpoint.read_step(out / "adapter") == 10
    (out / "metrics.jsonl").write_text(on_disk.get("lines", ""))
    run(resume=True)
    assert_same_run(out, uninterrupted)


def test_a_run_that_crashed_before_its_first_checkpoint_starts_anew(run_single, uninterrupted):
    run, lines, out = run_single
    with pytest.raises(RuntimeError, match="the machine stopped"):
        run(on_step=crash_at(3))
    assert not (out / "adapter").exists()
    run(resume=True)
    assert [line["step"] for line in lines] == [0, 0, 5, 10, 15, 20]
    assert_same_run(out, uninterrupted)


def test_a_line_without_its_checkpoint_is_written_again_once(
    run_single, uninterrupted, monkeypatch
):
    run, _, out = run_single
    snapshot = single.PackLoop.snapshot

    def failing(loop, trial_id):
        if loop.position(trial_id)[0] == 15:
            raise RuntimeError("the machine stopped")
        return snapshot(loop, trial_id)

    with monkeypatch.context() as patch:
        patch.setattr(single.PackLoop, "snapshot", failing)
        with pytest.raises(RuntimeError, match="the machine stopped"):
            run()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # cut off
    run(resume=True)
    assert_same_run(out, uninterrupted)


def test_accumulated_batches_equal_one_large_batch(run_single, tmp_path):
    run, _, _ = run_single
    run(trial=TRIAL.model_copy(update={"batch_clips": 6}), out=tmp_path / "large")
    run(trial=TRIAL, gradient_accumulation_steps=2, out=tmp_path / "two")
    large, two = (
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("large", "two")
    )
    torch.testing.assert_close(two, large, rtol=0, atol=1e-5)
    pairs = zip(
        *(read_lines(tmp_path / n / "metrics.jsonl") for n in ("large", "two")), strict=True
    )
    for one, other in pairs:
        for name in (metrics.VAL_TEXT_NLL, metrics.VAL_AUDIO_NLL, metrics.GRAD_NORM, metrics.EPOCH):
            assert other.get(name) == pytest.approx(one.get(name), abs=1e-5), name


def test_a_resume_with_another_number_of_clips_per_step_is_refused(run_single):
    run, _, _ = run_single
    run()
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps .* was 3, now 6"):
        run(resume=True, gradient_accumulation_steps=2)


@pytest.mark.parametrize("ended", [True, False])
def test_a_resume_on_other_data_is_refused(run_single, dataset, tmp_path, ended):
    run, _, out = run_single
    end = None if ended else signal.SIGTERM
    run(on_step=lambda step: os.kill(os.getpid(), end) if end and step == 7 else None)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = make_dataset(tmp_path / "other", seed=1)
    hashes = [info.content_hash[:12] for info in (other.info, dataset.info)]
    assert hashes[0] != hashes[1]
    message = rf"out: --resume with other data: .* content hash {hashes[0]}, .* with {hashes[1]}"
    with pytest.raises(ConfigError, match=message):
        run(resume=True, dataset=other)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert run(resume=True)["status"] == "completed"


def test_a_resume_on_the_same_data_in_another_place_goes_on(run_single, uninterrupted):
    run, _, out = run_single
    run(on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None)
    moved = DATA.model_copy(update={"path": "/moved/here"})
    assert run(resume=True, data=moved)["status"] == "completed"
    assert_same_run(out, uninterrupted)
    assert json.loads((out / "config.json").read_text())["data"]["path"] == "/moved/here"


def test_a_resume_on_other_weights_is_refused(run_single, monkeypatch):
    run, _, out = run_single
    run(on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 7 else None)
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = tiny_base()
    with torch.no_grad():
        other.model.text_lm_head.weight.mul_(3)
    with monkeypatch.context() as patch:
        patch.setattr(single, "load_base", lambda _: other)
        with pytest.raises(ConfigError, match=r"out: --resume on another base: .* val/text/nll"):
            run(resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert run(resume=True)["status"] == "completed"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_resume_with_more_processes_is_refused_only_with_dropout(run_single, dataset, dropout):
    run, _, out = run_single
    config = TRIAL.model_copy(update={"dropout": dropout, "batch_clips": 4})
    run(trial=config)
    hash_now = dataset.info.content_hash
    one = run_folder.Started(
        BaseSettings(), DATA, config, hash_now, clips_per_step=4, num_processes=1
    )
    two = replace(one, num_processes=2)
    if dropout:
        with pytest.raises(ConfigError, match=r"--resume in 2 process\(es\), .* began in 1: with"):
            run_folder.rewind(out, two)
    else:
        assert run_folder.rewind(out, two) == run_folder.rewind(out, one)
