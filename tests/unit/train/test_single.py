"""The one-configuration run: its folder, how it ends and how it goes on."""

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from higgs_tune import metrics
from higgs_tune.config import BaseSettings, RunSettings, TaskMix
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.train import checkpoint, single
from higgs_tune.train.recorder import Watcher, early_stop_reason
from higgs_tune.train.run_folder import best_step
from tests.models import DATA, make_dataset, tiny_base, trial

A = trial(seed=1)
CLOCKS = {metrics.TOKENS_PER_S, metrics.TRAIN_TIME_S, metrics.PEAK_MEMORY_MIB}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def run_single(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(
        single.PackLoop,
        "load",
        classmethod(lambda cls, _, data, *rest: cls(tiny_base(), dataset, data, *rest)),
    )
    lines = []

    def start(
        *,
        resume=False,
        report=lines.append,
        on_step=lambda step: None,
        data=DATA,
        trial=A,
        out=tmp_path / "out",
        **settings,
    ):
        return single.train_single(
            BaseSettings(),
            data,
            trial,
            out,
            resume=resume,
            watcher=Watcher(report, on_step),
            run=RunSettings(**{"num_samples": 0, "tensorboard": False} | settings),
        )

    return start, lines, tmp_path / "out"


def test_single_run_killed_between_intervals_goes_on_where_it_was(run_single):
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


def test_single_run_that_is_done_can_be_resumed_and_says_so(run_single):
    run, lines, out = run_single
    run()
    lines.clear()
    written = (out / "metrics.jsonl").read_text()
    assert run(resume=True)["status"] == "completed"
    assert [line["step"] for line in lines] == [20]
    assert (out / "metrics.jsonl").read_text() == written


def test_single_run_goes_on_with_its_own_settings_only(run_single):
    run, _, _ = run_single
    run()
    other = A.model_copy(update={"learning_rate": 0.5, "seed": 9})
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


def test_a_swap_of_checkpoints_that_stops_half_way_is_mended(run_single, monkeypatch):
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


def test_a_figure_without_a_value_is_null_on_disk(run_single):
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


def test_an_out_that_is_a_file_is_refused(run_single):
    run, _, out = run_single
    out.write_text("notes")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="out: is a file, needed a folder"):
            run(resume=resume)
    assert out.read_text() == "notes"


def test_single_run_cannot_resume_from_nothing(run_single):
    run, _, _ = run_single
    with pytest.raises(ConfigError, match="no adapter/ to go on from"):
        run(resume=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(out: Path, expected: Path) -> None:
    """Equal weights and moments, bit by bit, and equal figures but for the clock's."""
    for name in ("adapter_model.safetensors", "training_state.safetensors"):
        ours, theirs = load_file(out / "adapter" / name), load_file(expected / "adapter" / name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    ours, theirs = (
        [{n: v for n, v in line.items() if n not in CLOCKS} for line in read_lines(path)]
        for path in (out / "metrics.jsonl", expected / "metrics.jsonl")
    )
    assert ours == theirs


@pytest.fixture
def uninterrupted(run_single, tmp_path):
    run, lines, _ = run_single
    run(out=tmp_path / "whole")
    lines.clear()
    return tmp_path / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [1, 7, 10, 20])
def test_a_signal_ends_the_run_behind_its_step_and_it_goes_on_exactly(
    run_single, uninterrupted, number, at
):
    run, lines, out = run_single
    result = run(on_step=lambda step: os.kill(os.getpid(), number) if step == at else None)
    assert (result["status"], result["step"]) == ("cancelled", at)
    assert result["signal"] == number
    assert checkpoint.read_step(out / "adapter") == at
    assert [line["step"] for line in lines] == list(range(0, at, 5))  # the validation waits, too
    assert run(resume=True)["status"] == "completed"
    assert_same_run(out, uninterrupted)


def test_a_signal_before_the_first_step_leaves_a_run_that_goes_on(run_single, uninterrupted):
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


def test_a_crash_goes_on_from_the_last_checkpoint_between_validations(run_single, uninterrupted):
    run, lines, out = run_single
    with pytest.raises(RuntimeError, match="the machine stopped"):
        run(save_every_steps=3, on_step=crash_at(14))
    assert checkpoint.read_step(out / "adapter") == 12
    lines.clear()
    assert run(resume=True, save_every_steps=3)["status"] == "completed"
    assert [line["step"] for line in lines] == [15, 20]
    assert_same_run(out, uninterrupted)


def test_a_crash_before_the_first_checkpoint_starts_anew(run_single, uninterrupted):
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
    save = single.PackLoop.save

    def failing(loop, trial_id, directory):
        if loop.position(trial_id)[0] == 15:
            raise RuntimeError("the machine stopped")
        save(loop, trial_id, directory)

    with monkeypatch.context() as patch:
        patch.setattr(single.PackLoop, "save", failing)
        with pytest.raises(RuntimeError, match="the machine stopped"):
            run()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # cut off
    run(resume=True)
    assert_same_run(out, uninterrupted)


def test_accumulated_batches_are_one_large_batch(run_single, tmp_path):
    run, _, _ = run_single
    run(trial=A.model_copy(update={"batch_clips": 6}), out=tmp_path / "large")
    run(trial=A, gradient_accumulation_steps=2, out=tmp_path / "two")
    large, two = (
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("large", "two")
    )
    torch.testing.assert_close(two, large, rtol=0, atol=1e-5)
    pairs = zip(
        *(read_lines(tmp_path / n / "metrics.jsonl") for n in ("large", "two")), strict=True
    )
    for one, other in pairs:
        for name in (metrics.VAL_TEXT_NLL, metrics.VAL_AUDIO_NLL, metrics.GRAD_NORM):
            assert other.get(name) == pytest.approx(one.get(name), abs=1e-5), name


def test_another_number_of_clips_a_step_is_another_run(run_single):
    run, _, _ = run_single
    run()
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps .* was 3, now 6"):
        run(resume=True, gradient_accumulation_steps=2)


def history(*texts, audio=None):
    """Lines of validations 10 steps apart, the untouched base's first."""
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


def test_a_run_without_progress_ends_early_and_goes_on_with_more_patience(
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


def test_the_best_has_the_lowest_text_loss_of_those_that_kept_audio():
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


def test_the_newest_checkpoints_are_kept_and_lead_back(run_single, uninterrupted):
    run, _, out = run_single
    run(keep_checkpoints=2)
    kept = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert kept == ["step-000015", "step-000020"]
    shutil.rmtree(out / "adapter")
    (out / "checkpoints" / "step-000015").rename(out / "adapter")
    assert run(resume=True)["status"] == "completed"
    assert_same_run(out, uninterrupted)


def events(directory: Path) -> dict[str, dict[int, float]]:
    """Tag → step → value of the event files, as TensorBoard reads them."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(directory.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


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
    assert set(events(out / "tensorboard")["samples/text_summary"]) == {5, 10, 15, 20}


def test_samples_change_nothing_of_the_training(run_single, uninterrupted):
    run, _, out = run_single
    run(num_samples=2, max_sample_tokens=4)
    assert_same_run(out, uninterrupted)
