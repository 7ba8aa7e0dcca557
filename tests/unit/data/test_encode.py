"""Preparing a dataset: what comes out, what is rejected, and what a run that stopped left behind."""

import argparse
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from higgs_tune.config import TaskMix
from higgs_tune.data import clips, encode, files, prepare_cli
from higgs_tune.data.codec import MelRvqCodec, MelRvqCodecConfig, encode_clip, load_codec
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.shards import DatasetInfo, list_shards
from higgs_tune.errors import ConfigError, DataError

RATE_HZ = 24000


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec that codes something: the shipped one's structure with random weights."""
    folder = tmp_path_factory.mktemp("codec")
    config = MelRvqCodecConfig(num_quantizers=2, codebook_size=16, num_features=8, num_mels=20)
    codec = MelRvqCodec(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        codec.set_filters()
        for name, weight in codec.named_parameters():
            if name in ("projection", "codebooks"):
                weight.normal_(generator=generator)
    codec.save_pretrained(folder)
    return folder


def speech(seed: int, seconds: float = 0.4, rate_hz: int = RATE_HZ) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate_hz)).astype(np.float32)


def make_root(folder: Path, count: int) -> list[dict[str, Any]]:
    """`count` recordings and a row for each."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(count):
        soundfile.write(folder / f"{n}.wav", speech(n), RATE_HZ)
        rows.append({"id": f"c{n}", "path": f"{n}.wav", "text": f"text {n}", "speaker": "s"})
    return rows


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(tmp_path: Path, codec_folder: Path) -> Callable[..., DatasetInfo]:
    """Write a manifest of rows into tmp_path/root and prepare it."""

    def prepare(rows: list[dict[str, Any]], out: str = "out", **options: Any) -> DatasetInfo:
        return encode.prepare(
            write_manifest(tmp_path / "root", rows),
            tmp_path / out,
            codec=str(codec_folder),
            options=PrepareOptions(**({"rows_per_shard": 4} | options)),
        )

    return prepare


def rejected(out: Path) -> dict[str, str]:
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


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
    found = {dataset.ids[n]: dataset.row(n) for n in range(10)}
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
    """Recordings that cannot be used, and what is said of them."""
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
    reasons |= {"none": "text is empty", "c1": "already that of row 2", "much": "5000 characters"}
    found = rejected(tmp_path / "out")
    assert found.keys() == reasons.keys()
    assert all(reason in found[name] for name, reason in reasons.items())
    assert (info.num_rows, info.num_rejected) == (6, len(bad))
    assert sorted(Dataset.open(str(tmp_path / "out")).ids) == sorted(row["id"] for row in rows)


@pytest.mark.parametrize("stage", ["manifest", "audio"])
def test_too_many_rejected_rows_leave_shards_but_no_dataset(tmp_path: Path, run, stage: str):
    rows = make_root(tmp_path / "root", 8)
    rows[2] |= {"text": ""} if stage == "manifest" else {"path": "nowhere.wav"}
    with pytest.raises(
        DataError, match=r"1 of 8 rows are rejected, 0 are allowed .*row 3: .*rejected\.jsonl"
    ) as caught:
        run(rows, max_rejected=0.1)
    out = tmp_path / "out"
    how = str(caught.value).partition("rejected.jsonl. ")[2]
    assert (
        how
        == {
            "manifest": "Mend the manifest or the recordings, or raise --max-rejected.",
            "audio": "Mend the recordings (what is encoded is kept), give a mended manifest a new "
            "--out, or raise --max-rejected.",
        }[stage]
    )
    assert list(rejected(out)) == ["c2"]
    with pytest.raises(DataError, match=r"found no dataset\.json"):
        Dataset.open(str(out))
    assert len(list_shards(out)) == (0 if stage == "manifest" else 2)
    assert run(rows, max_rejected=1).num_rows == 7


def test_what_is_encoded_is_kept_for_mended_recordings_and_not_for_a_mended_manifest(
    tmp_path: Path, run, monkeypatch
):
    rows = make_root(tmp_path / "root", 8)
    rows[2] |= {"path": "late.wav"}
    with pytest.raises(DataError, match="1 of 8 rows are rejected"):
        run(rows, max_rejected=0)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest rows changed since\. Give another --out"):
        run([*rows[:2], *rows[3:]], max_rejected=0)
    assert content(tmp_path / "out") == before
    soundfile.write(tmp_path / "root" / "late.wav", speech(9), RATE_HZ)
    seen = spy(monkeypatch)
    assert run(rows, max_rejected=0).num_rows == 8
    assert len(seen) == 4, "the other shard is not touched"


def test_a_mended_manifest_is_prepared_where_nothing_was_encoded_yet(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    with pytest.raises(DataError, match="1 of 6 rows are rejected"):
        run([rows[0] | {"text": ""}, *rows[1:]], max_rejected=0)
    assert run(rows, max_rejected=0).num_rows == 6


def test_a_dataset_of_rejected_rows_only_is_refused(tmp_path: Path, run):
    (tmp_path / "root").mkdir()
    rows = [{"path": f"{n}.wav", "text": f"text {n}"} for n in range(5)]
    with pytest.raises(DataError, match="5 of 5 rows are rejected"):
        run(rows, max_rejected=5)


def test_a_recording_that_was_mended_is_encoded_on_the_next_run(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 12)
    good = (tmp_path / "root" / "5.wav").read_bytes()
    (tmp_path / "root" / "5.wav").write_bytes(b"")
    assert run(rows, max_rejected=1).num_rows == 11
    (tmp_path / "root" / "5.wav").write_bytes(good)
    seen = spy(monkeypatch)
    assert run(rows, max_rejected=1).num_rows == 12
    assert len(seen) == 4, "the other two shards are not touched"
    assert rejected(tmp_path / "out") == {}


def spy(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Record the clips that are encoded; interrupt in the midst of one."""
    seen: list[int] = []
    real = clips.encode_clip

    def watched(codec: Any, wave: np.ndarray, rate_hz: int) -> np.ndarray:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(len(wave))
        return real(codec, wave, rate_hz)

    monkeypatch.setattr(clips, "encode_clip", watched)
    return seen


@pytest.mark.parametrize("stop_after", [0, 3, 4, 9])
def test_a_run_that_was_cut_off_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, run, monkeypatch, stop_after: int
):
    rows = make_root(tmp_path / "root", 11)
    rows.append({"id": "bad", "path": "nowhere.wav", "text": "bad"})
    run(rows, "whole", max_rejected=1)
    with monkeypatch.context() as patch:
        spy(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(rows, max_rejected=1)
    assert not (tmp_path / "out" / "dataset.json").exists()
    (tmp_path / "out" / "shards").mkdir(exist_ok=True)
    (tmp_path / "out" / "shards" / "part-00002.parquet.7.tmp").write_text("of a killed process")
    num_done = 4 * (stop_after // 4)
    assert len(list_shards(tmp_path / "out")) == num_done // 4
    seen = spy(monkeypatch)
    run(rows, max_rejected=1)
    assert len(seen) == 11 - num_done
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    seen.clear()
    run(rows, max_rejected=1)
    assert seen == []
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_folder_of_other_data_is_left_alone(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    run(rows)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"from something else: max_seconds changed since"):
        run(rows, max_seconds=20)
    with pytest.raises(DataError, match=r"from something else: manifest rows changed since"):
        run([*rows[:5], rows[5] | {"text": "other"}])
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "prepare.json").unlink()
    with pytest.raises(DataError, match="holds a dataset that this command did not make"):
        run(rows)


def test_more_rejected_rows_may_be_allowed_afterwards(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 8)
    run(rows, max_rejected=0)
    run(rows, max_rejected=3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_finished_shards_stay(tmp_path: Path, run, monkeypatch, code: int):
    rows = make_root(tmp_path / "root", 8)
    real = encode.write_shard

    def full(path: Path, *args: Any) -> None:
        if path.name == "part-00001.parquet":

            def fill(temporary: Path) -> None:
                temporary.write_bytes(b"half")
                raise OSError(code, os.strerror(code))

            files.write_file(path, fill)
        real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_shard", full)
        with pytest.raises(DataError, match=r"part-00001\.parquet: no space left on the disk"):
            run(rows)
    left = {path.name for path in (tmp_path / "out" / "shards").iterdir()}
    assert left == {"part-00000.parquet", "part-00000.json"}
    assert run(rows).num_rows == 8


def test_an_out_folder_that_cannot_be_written_is_named_before_encoding(
    tmp_path: Path, run, monkeypatch
):
    rows = make_root(tmp_path / "root", 4)
    (tmp_path / "out").write_text("a file")
    seen = spy(monkeypatch)
    with pytest.raises(DataError, match=r"out/prepare\.json: cannot be written"):
        run(rows)
    assert seen == []


def test_a_missing_data_root_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="--data-root is where the recordings are"):
        encode.prepare(tmp_path / "m.csv", tmp_path / "out", data_root=tmp_path / "nowhere")


def test_the_command_prepares_and_reports(tmp_path: Path, codec_folder: Path, capsys):
    manifest = write_manifest(tmp_path, make_root(tmp_path / "root", 6))
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    words = f"{manifest} --out {tmp_path / 'out'} --data-root {tmp_path / 'root'}".split()
    args = parser.parse_args([*words, "--codec", str(codec_folder), "--val-fraction", "0.4"])
    assert prepare_cli.run(args) == 0
    printed = capsys.readouterr()
    assert "6 rows (4 train, 2 validation), 0.00 h of audio" in printed.out
    assert "encode: 6/6" in printed.err
    assert Dataset.open(str(tmp_path / "out")).info.splits == {"train": 4, "validation": 2}
    with pytest.raises(ConfigError, match=r"val_fraction: .*less than or equal to 0\.5"):
        prepare_cli.run(parser.parse_args([*words, "--val-fraction", "0.9"]))
