"""Preparing a dataset: what it contains, and what is rejected."""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from higgs_tune import cli
from higgs_tune.config_data import TaskMix
from higgs_tune.data import clips, encode, prepare_cli
from higgs_tune.data.codec import encode_clip, load_codec, weights_digest
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.encode_ray import CodecSource, _Encoder
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.shards import list_shards
from higgs_tune.errors import ConfigError, DataError, NoMemoryError
from tests.unit.data.recordings import RATE_HZ, make_root, rejected, speech, spy, write_manifest


def test_prepared_clips_hold_the_codes_of_their_recordings(tmp_path: Path, codec_folder: Path, run):
    rows = make_root(tmp_path / "root", 10)
    low, stereo = speech(1, rate_hz=8000), np.stack([speech(2), speech(3)], axis=1)
    soundfile.write(tmp_path / "root" / "0.wav", low, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "root" / "1.flac", stereo, RATE_HZ, subtype="PCM_24")
    rows[1]["path"] = "1.flac"
    rows[2] |= {"ref_audio": "3.wav", "ref_text": "a reference", "language": "de"}
    info = run(rows)
    assert (info.num_rows, info.num_rejected, sum(info.splits.values())) == (10, 0, 10)
    assert info.hours == pytest.approx(11 * 10 / 25 / 3600, abs=1e-6)
    assert info.codec.frame_rate_hz == 25
    assert (info.codec.num_codebooks, info.codec.codebook_size) == (2, 16)
    dataset = Dataset.open(str(tmp_path / "out"))
    codec = load_codec(str(codec_folder))
    found = {row.id: row for row in map(dataset.row, range(10))}
    np.testing.assert_array_equal(found["c0"].codes[0], encode_clip(codec, low, 8000))
    mono, _ = soundfile.read(tmp_path / "root" / "1.flac", dtype="float32")
    np.testing.assert_array_equal(
        found["c1"].codes[0], encode_clip(codec, mono.mean(axis=1), RATE_HZ)
    )
    np.testing.assert_array_equal(found["c2"].codes[1], found["c3"].codes[0])
    assert (found["c2"].ref_text, found["c2"].language) == ("a reference", "de")
    assert "no text is shared" in info.split_rule


def test_chat_rows_train_as_they_were_written(tmp_path: Path, run):
    make_root(tmp_path / "root", 3)
    messages = [
        {"role": "system", "content": "Speak."},
        {"role": "user", "content": "reference"},
        {"role": "assistant", "content": [{"type": "audio", "audio_url": "0.wav"}]},
        {"role": "user", "content": "target"},
        {"role": "assistant", "content": {"type": "audio", "audio_url": "1.wav"}},
    ]
    run([{"id": "x", "messages": messages}], val_fraction=0)
    dataset = Dataset.open(str(tmp_path / "out"))
    (conversation,) = TrainOrder(dataset, TaskMix(), 1, seed=0).batch(0)
    assert [turn.role for turn in conversation.turns] == [m["role"] for m in messages]
    assert [turn.target for turn in conversation.turns] == [False] * 4 + [True]


def bad_recordings(root: Path) -> dict[str, str]:
    """Unusable recordings, each with the reason for its rejection."""
    outside = root.parent / "outside.wav"
    soundfile.write(outside, speech(0), RATE_HZ)
    (root / "link.wav").symlink_to(outside)
    (root / "empty.wav").touch()
    (root / "text.wav").write_text("no audio " * 50)
    soundfile.write(root / "short.wav", speech(0, 0.05), RATE_HZ)
    soundfile.write(root / "long.wav", np.tile(speech(0, 1, 8000), 600), 8000)
    soundfile.write(root / "silent.wav", 0 * speech(0), RATE_HZ)
    nan = speech(0)
    nan[5] = np.nan
    soundfile.write(root / "nan.wav", nan, RATE_HZ, subtype="FLOAT")
    return {
        "missing.wav": "does not exist",
        "../outside.wav": "outside the data root",
        str(outside): "outside the data root",
        "link.wav": "outside the data root",
        "empty.wav": "the file is empty",
        "text.wav": "cannot be read",
        "short.wav": "too short: 0.050 s",
        "long.wav": "too long: 600.0 s",
        "silent.wav": "silent",
        "nan.wav": "1 samples that are NaN",
    }


def test_every_bad_row_is_listed_and_the_good_ones_are_kept(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    reasons = bad_recordings(tmp_path / "root")
    bad = [{"id": name, "path": name, "text": f"bad {name}"} for name in reasons]
    bad += [{"id": "none", "path": "0.wav", "text": ""}, {"id": "c1", "path": "1.wav", "text": "x"}]
    bad += [{"id": "much", "path": "0.wav", "text": "x" * 5000}]
    info = run(rows + bad, max_rejected=len(bad))
    reasons |= {"none": "text is empty", "c1": "already used by row 2", "much": "5000 characters"}
    found = rejected(tmp_path / "out")
    assert found.keys() == reasons.keys()
    assert all(reason in found[name] for name, reason in reasons.items())
    assert (info.num_rows, info.num_rejected) == (6, len(bad))
    found = [row_id for row_id, _ in Dataset.open(str(tmp_path / "out")).texts()]
    assert sorted(found) == sorted(row["id"] for row in rows)


def test_the_rejection_names_which_recording_of_a_row_is_bad(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    (tmp_path / "root" / "voice.wav").write_text("no audio " * 50)
    rows[1] |= {"ref_audio": "voice.wav", "ref_text": "reference"}
    parts = [{"type": "audio", "path": name} for name in ("0.wav", "voice.wav")]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "two"}]
    run([*rows, {"id": "chat", "messages": messages}], max_rejected=2, val_fraction=0)
    found = rejected(tmp_path / "out")
    assert found.keys() == {"c1", "chat"}
    assert all(reason.startswith("'voice.wav': audio cannot be read") for reason in found.values())


@pytest.mark.parametrize("val_fraction", [0, 0.3])
def test_rows_that_repeat_a_clip_are_counted_in_a_warning(
    tmp_path: Path, run, caplog: pytest.LogCaptureFixture, val_fraction: float
):
    rows = make_root(tmp_path / "root", 6)
    more = [
        rows[4] | {"id": "a"},
        rows[2] | {"id": "b", "path": "./2.wav"},
        rows[2] | {"id": "c", "text": "other"},
    ]
    assert run(rows + more, val_fraction=val_fraction).num_rows == 9
    assert (
        "2 rows (the first is row 7) repeat the recording and the text of an earlier row"
        in caplog.text
    )


@pytest.mark.parametrize("stage", ["manifest", "audio"])
def test_too_many_rejected_rows_leave_no_dataset(tmp_path: Path, run, stage: str):
    rows = make_root(tmp_path / "root", 8)
    if stage == "manifest":
        rows[2]["text"] = ""
    else:
        (tmp_path / "root" / "2.wav").write_bytes(b"no audio")
    with pytest.raises(
        DataError, match=r"1 of 8 rows are rejected, 0 are allowed .*row 3: .*rejected\.jsonl"
    ) as caught:
        run(rows, max_rejected=0.1)
    out = tmp_path / "out"
    how = str(caught.value).partition("rejected.jsonl. ")[2]
    assert (
        how
        == {
            "manifest": "Fix the manifest or the recordings, or raise --max-rejected.",
            "audio": "Fix the recordings (what is encoded is kept), use a new --out for a fixed "
            "manifest, or raise --max-rejected.",
        }[stage]
    )
    assert list(rejected(out)) == ["c2"]
    with pytest.raises(DataError, match=r"found no dataset\.json"):
        Dataset.open(str(out))
    assert len(list_shards(out)) == (0 if stage == "manifest" else 2)
    assert run(rows, max_rejected=1).num_rows == 7


def test_the_error_names_the_first_rejected_row_of_each_reason(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 10)
    faults = {1: {"path": "no.wav"}, 2: {"text": ""}, 3: {"text": ""}, 5: {"path": "it's.wav"}}
    faults[6] = {"ref_audio": "nor.wav", "ref_text": "x"}
    faults[7] = {"ref_audio": "neither.wav", "ref_text": "x"}
    for number, fault in faults.items():
        rows[number] |= fault
    with pytest.raises(DataError, match="6 of 10 rows") as caught:
        run(rows, max_rejected=2)
    found = re.findall(r"row (\d+): (?:'[a-z.]*': )?([a-z]*)", str(caught.value))
    assert found == [("2", "audio"), ("3", "text"), ("7", "audio")]


def test_missing_recordings_are_reported_before_any_encoding(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 12)
    wrong = [row | {"path": f"audio/{row['path']}"} for row in rows[8:]]
    seen = spy(monkeypatch)
    with pytest.raises(
        DataError, match=r"4 of 12 rows are rejected, 3 are allowed .*row 9: .* or set --data-root"
    ):
        run([*rows[:8], *wrong], max_rejected=3)
    assert not seen
    assert list_shards(tmp_path / "out") == []
    assert list(rejected(tmp_path / "out")) == ["c8", "c9", "c10", "c11"]
    assert run(rows, max_rejected=3).num_rows == 12, "a fixed manifest goes into the same folder"
    assert rejected(tmp_path / "out") == {}


def test_missing_recordings_up_to_the_limit_are_left_out(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 12)
    rows[9]["path"], rows[10]["path"] = "no.wav", "nor.wav"
    assert run(rows, max_rejected=2).num_rows == 10
    before = rejected(tmp_path / "out")
    assert list(before) == ["c9", "c10"]
    assert run(rows, max_rejected=2).num_rows == 10
    assert rejected(tmp_path / "out") == before


def test_a_clip_that_does_not_fit_in_memory_is_an_error_that_names_it(
    tmp_path: Path, codec_folder: Path, run, monkeypatch
):
    def encode_clip(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(clips, "encode_clip", encode_clip)
    rows = make_root(tmp_path / "root", 6)
    message = r"0\.wav: not enough memory on cpu to encode 0\.4 s: .* 2\.00 GiB\. Lower --workers"
    with pytest.raises(NoMemoryError, match=message):
        run(rows)
    source = CodecSource(
        str(codec_folder), None, weights_digest(load_codec(str(codec_folder))), num_codebooks=2
    )
    actor = _Encoder(source, clips.ClipRules(tmp_path / "root", 0.1, 30.0), "cpu")
    block = pa.Table.from_pylist([{"index": 0, "names": ["0.wav"]}])
    assert re.search(message, actor(block).to_pylist()[0]["fatal"])


def test_a_dataset_with_only_rejected_rows_is_refused(tmp_path: Path, run):
    (tmp_path / "root").mkdir()
    rows = [{"path": f"{n}.wav", "text": f"text {n}"} for n in range(5)]
    with pytest.raises(DataError, match="5 of 5 rows are rejected"):
        run(rows, max_rejected=5)


def test_a_missing_data_root_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="--data-root is where the recordings are"):
        encode.prepare(tmp_path / "m.csv", tmp_path / "out", data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("where", ["root", "out", "target"])
def test_a_folder_or_file_whose_name_is_not_utf8_is_a_plain_error(
    tmp_path: Path, capsys, where: str
):
    cp1256 = os.fsdecode("صوت".encode("cp1256"))
    root = tmp_path / (cp1256 if where == "root" else "root")
    out = tmp_path / (cp1256 if where == "out" else "out")
    rows = make_root(tmp_path / "root", 6)
    if where == "target":
        (root / "0.wav").rename(root / cp1256)
        (root / "0.wav").symlink_to(cp1256)
    (tmp_path / "root").rename(root)
    arguments = ["data", "prepare", str(write_manifest(root, rows)), "--out", str(out)]
    assert cli.main(arguments) == cli.BAD_INPUT
    assert "not UTF-8" in capsys.readouterr().err


def test_the_command_prepares_and_reports(
    tmp_path: Path, codec_folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    manifest = write_manifest(tmp_path, make_root(tmp_path / "root", 6))
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    words = f"{manifest} --out {tmp_path / 'out'} --data-root {tmp_path / 'root'}".split()
    args = parser.parse_args([*words, "--codec", str(codec_folder), "--val-fraction", "0.4"])
    with monkeypatch.context() as patch:
        spy(patch, stop_after=3)
        assert prepare_cli.run(args) == 130
    assert (
        "the same command continues: finished shards of 256 rows are kept"
        in capsys.readouterr().err
    )
    assert prepare_cli.run(args) == 0
    printed = capsys.readouterr()
    assert "6 rows (4 train, 2 validation), 0.00 h of audio" in printed.out
    assert f"\nnext: higgs-tune check --base BASE --data {tmp_path / 'out'}\n" in printed.out
    assert "encode: 6/6" in printed.err
    assert Dataset.open(str(tmp_path / "out")).info.splits == {"train": 4, "validation": 2}
    with pytest.raises(ConfigError, match=r"val_fraction: .*less than or equal to 0\.5"):
        prepare_cli.run(parser.parse_args([*words, "--val-fraction", "0.9"]))


def test_an_invalid_number_of_workers_is_a_plain_error(tmp_path, capsys):
    words = ["data", "prepare", "m.csv", "--out", str(tmp_path / "out"), "--workers"]
    assert cli.main([*words, "0"]) == 2
    assert "--workers: found 0, needed at least 1." in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main([*words, "x"])
    assert "argument --workers: invalid int value: 'x'" in capsys.readouterr().err


def test_an_interruption_is_announced_before_the_workers_end(tmp_path: Path, capsys, monkeypatch):
    def interrupted(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            print("Ray ends", file=sys.stderr)

    former = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(encode, "prepare", interrupted)
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    args = parser.parse_args(f"m.csv --out {tmp_path} --workers 2".split())
    assert prepare_cli.run(args) == 130
    said = [line.split(" ")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["interrupted:", "Ray", "interrupted;"]
    assert signal.getsignal(signal.SIGINT) is former
