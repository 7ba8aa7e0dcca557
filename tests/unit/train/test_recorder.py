"""What a run keeps: best adapter, checkpoints and samples; and when it stops early."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from higgs_tune import metrics
from higgs_tune.config import RunSettings
from higgs_tune.errors import DataError
from higgs_tune.train import checkpoint, recorder
from higgs_tune.train.recorder import early_stop_reason
from higgs_tune.train.run_folder import BEST, KEPT, best_step, repair_best
from tests.boards import events
from tests.models import trial
from tests.runs import assert_same_run, read_lines


def history(*texts, audio=None):
    """Lines of validations 10 steps apart; the first is the untouched base's."""
    audio = audio or [5.0] * len(texts)
    return [
        {
            metrics.STEP: 10 * n,
            metrics.VAL_TEXT_NLL: text,
            metrics.VAL_AUDIO_NLL: audio[n],
            "status": "running",
        }
        for n, text in enumerate(texts)
    ]


def test_early_stop_waits_for_its_patience():
    settings = RunSettings(early_stop_patience=2, early_stop_min_delta=0.1)
    assert early_stop_reason(history(8, 3), settings) is None
    assert early_stop_reason(history(8, 3, 2.95), settings) is None
    assert early_stop_reason(history(8, 3, 2.95, 2.8), settings) is None
    reason = early_stop_reason(history(8, 3, 2.95, 2.91), settings)
    assert reason is not None
    assert "was 3.0000 at step 10 and not better in 2 validations" in reason
    assert early_stop_reason(history(8, 3, 4, 5), RunSettings()) is None
    patient = RunSettings(early_stop_patience=2)
    assert early_stop_reason(history(8, 3, 3, 3), patient) is not None
    assert early_stop_reason(history(8, 3, 4, 2, 5), patient) is None  # a new best starts anew
    assert early_stop_reason(history(1, 9, 8), patient) is None  # the base need not be beaten


def test_a_run_without_progress_ends_early_and_resumes_without_that_limit(
    run_single, uninterrupted
):
    run, _, out = run_single
    strict = {"early_stop_patience": 1, "early_stop_min_delta": 100.0}
    result = run(**strict)
    assert (result["status"], result["step"]) == ("completed", 10)
    assert result["reason"].startswith("early stop: val/text/nll was")
    assert run(resume=True, **strict)["step"] == 10
    assert len(read_lines(out / "metrics.jsonl")) == 3
    assert run(resume=True)["step"] == 20
    ours, theirs = (
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (out, uninterrupted)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("num_samples", [0, 1])
def test_resuming_with_less_patience_than_already_used_ends_the_run_early(run_single, num_samples):
    run, lines, _ = run_single

    def interrupt(step):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    assert run(on_step=interrupt)["status"] == "cancelled"
    lines.clear()
    strict = {"early_stop_patience": 1, "early_stop_min_delta": 100.0}
    result = run(resume=True, num_samples=num_samples, **strict)
    assert (result["status"], result["step"]) == ("completed", 10)
    assert result["reason"].startswith("early stop: val/text/nll was")


def test_the_best_step_has_the_lowest_text_loss_within_the_audio_tolerance():
    assert best_step(history(8, 3, 2, 3), 0.05) == 20
    assert best_step(history(8, 3, 2, 3, audio=[5.0, 5.1, 5.3, 5.2]), 0.05) == 10
    assert best_step(history(8, 3, audio=[5.0, 6.0]), 0.05) is None
    diverged = history(8, 3, 2)
    diverged[-1] = {metrics.STEP: 20, "status": "diverged"}
    assert best_step(diverged, 0.05) == 10


def test_best_adapter_is_the_checkpoint_of_the_best_step(run_single):
    run, _, out = run_single
    run(keep_checkpoints=4, audio_tolerance=10.0)
    step = best_step(read_lines(out / "metrics.jsonl"), 10.0)
    best, then = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (out / "best_adapter", out / "checkpoints" / f"step-{step:06d}")
    )
    torch.testing.assert_close(best, then, rtol=0, atol=0)
    assert not list((out / "best_adapter").glob("training_state*"))


FASTER = {"seed": 1, "audio_loss_weight": 0.0, "learning_rate": 5e-2}  # audio gets worse


def best_of(out: Path) -> tuple[int, dict]:
    """The step and the weights of `best_adapter/`."""
    step = json.loads((out / "best_adapter" / "best.json").read_text())["step"]
    return step, load_file(out / "best_adapter" / "adapter_model.safetensors")


def test_best_adapter_follows_the_tolerance_of_a_resume(run_single, caplog):
    run, _, out = run_single
    settings = {"trial": trial(**FASTER), "keep_checkpoints": 4}
    run(**settings, audio_tolerance=10.0)
    for tolerance in (0.0, 10.0):
        step = best_step(read_lines(out / "metrics.jsonl"), tolerance)
        run(**settings, resume=True, audio_tolerance=tolerance)
        checkpoint = out / "checkpoints" / f"step-{step:06d}" / "adapter_model.safetensors"
        found, weights = best_of(out)
        assert found == step
        torch.testing.assert_close(weights, load_file(checkpoint), rtol=0, atol=0)
    assert not caplog.records
    shutil.rmtree(out / "checkpoints" / "step-000005")
    run(**settings, resume=True, audio_tolerance=0.0)
    assert not (out / "best_adapter").exists()
    assert "was of step 20; with run.audio_tolerance 0 the best is step 5" in caplog.text


def test_a_looser_tolerance_can_make_the_newest_checkpoint_the_best(run_single, caplog):
    run, _, out = run_single
    run(trial=trial(**FASTER), audio_tolerance=0.0)
    assert best_of(out)[0] == 5
    repair_best(out, read_lines(out / "metrics.jsonl"), RunSettings(audio_tolerance=10.0))
    step, weights = best_of(out)
    assert step == checkpoint.read_step(out / "adapter") == 20
    newest = load_file(out / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(weights, newest, rtol=0, atol=0)
    assert not caplog.records


def test_best_adapter_is_never_of_a_step_that_was_rolled_back(run_single):
    run, _, out = run_single
    settings = RunSettings(keep_checkpoints=4, audio_tolerance=10.0)
    run(keep_checkpoints=4, audio_tolerance=10.0)
    assert best_of(out)[0] == 20
    lines = [line for line in read_lines(out / "metrics.jsonl") if line["step"] <= 10]
    repair_best(out, lines, settings)  # as after going back to the checkpoint of step 10
    assert best_of(out)[0] == best_step(lines, 10.0) <= 10
    repair_best(out, [], settings)
    assert not (out / "best_adapter").exists()


def test_the_newest_checkpoints_are_kept_and_can_be_resumed_from(run_single, uninterrupted):
    run, _, out = run_single
    run(keep_checkpoints=2)
    kept = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert kept == ["step-000015", "step-000020"]
    shutil.rmtree(out / "adapter")
    (out / "checkpoints" / "step-000015").rename(out / "adapter")
    assert run(resume=True)["status"] == "completed"
    assert_same_run(out, uninterrupted)


def test_tensorboard_has_every_figure_of_every_line(run_single):
    run, lines, out = run_single
    run(tensorboard=True)
    found = events(out / "tensorboard")
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float):
                assert found[name][line["step"]] == pytest.approx(value, rel=1e-6), name


def test_samples_of_every_validation_are_written_once(run_single):
    run, _, out = run_single
    settings = {"num_samples": 3, "max_sample_tokens": 5, "tensorboard": True}
    run(
        **settings,
        on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 12 else None,
    )
    run(**settings, resume=True)
    samples = read_lines(out / "samples.jsonl")
    assert [s["step"] for s in samples] == [5] * 3 + [10] * 3 + [15] * 3 + [20] * 3
    assert len({s["key"] for s in samples}) == 3
    assert all(s["target"] for s in samples)
    assert max(len(s["predicted"]) for s in samples) <= 5
    assert set(events(out / "tensorboard")["samples/text_summary"]) == {5, 10, 15, 20}


def test_a_run_goes_on_without_samples_if_memory_runs_out_for_them(
    run_single, uninterrupted, monkeypatch, caplog
):
    def too_big(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(recorder, "sample_predictions", too_big)
    run, _, out = run_single
    run(num_samples=2)
    assert_same_run(out, uninterrupted)
    assert "no memory for samples beside the training, see run.num_samples" in caplog.text


def test_samples_do_not_change_the_training(run_single, uninterrupted):
    run, _, out = run_single
    run(num_samples=2, max_sample_tokens=4)
    assert_same_run(out, uninterrupted)


def copies(out):
    """The files of the copied checkpoints, without the one that holds clock times."""
    folders = [out / BEST, out / KEPT]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.name != "training_state.json"
    }


KEEP = {"keep_checkpoints": 2, "audio_tolerance": 10.0}


@pytest.mark.parametrize("patience", [None, 1])
def test_copies_that_failed_at_the_end_are_made_by_a_resume(
    run_single, tmp_path, monkeypatch, patience
):
    run, _, out = run_single
    settings = KEEP | {"early_stop_patience": patience, "early_stop_min_delta": 100.0}
    end = 10 if patience else 20
    assert run(out=tmp_path / "whole", **settings)["step"] == end
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    assert best_step(lines, KEEP["audio_tolerance"]) == end, "the copy that fails must be the best"
    copytree = shutil.copytree

    def full(source, *args, **kwargs):
        if checkpoint.read_step(source) == end:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copytree(source, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(DataError, match=r"No space left on device.* --resume"):
            run(**settings)
    assert copies(out) != copies(tmp_path / "whole")
    for _ in range(2):
        assert run(resume=True, **settings)["step"] == end
        assert copies(out) == copies(tmp_path / "whole")


def test_a_checkpoint_from_after_an_early_stop_is_not_copied(run_single):
    run, _, out = run_single
    strict = KEEP | {"early_stop_patience": 1, "early_stop_min_delta": 100.0}
    run(**strict)
    expected = copies(out)
    run(
        resume=True,
        **KEEP,
        on_step=lambda s: os.kill(os.getpid(), signal.SIGTERM) if s == 12 else 0,
    )
    assert checkpoint.read_step(out / "adapter") == 12
    assert run(resume=True, **strict)["step"] == 10
    assert copies(out) == expected
