"""`higgs-tune data unpack`: recordings inside Parquet files, as in Hugging Face datasets."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from higgs_tune import cli
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.unpack import MANIFEST, RECORDINGS, unpack
from higgs_tune.errors import DataError


def wav(number: int) -> bytes:
    noise = np.random.default_rng(number).normal(0, 0.1, 8000)
    content = io.BytesIO()
    soundfile.write(content, noise, 16_000, format="WAV")
    return content.getvalue()


def common_voice(path: Path, numbers: range) -> None:
    """A file with the columns of Common Voice on the Hub."""
    rows = [
        {
            "client_id": f"speaker-{number % 4}",
            "path": f"common_voice_ar_{number}.wav",
            "audio": {"bytes": wav(number), "path": f"common_voice_ar_{number}.wav"},
            "sentence": f"نص رقم {'ابتثجحخدذرزسشصضطظعغ'[number]}",
            "locale": "ar",
        }
        for number in numbers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_rows_of_several_files_become_recordings_and_one_manifest(tmp_path):
    common_voice(tmp_path / "a.parquet", range(3))
    common_voice(tmp_path / "b.parquet", range(3, 5))
    found = unpack([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "out")
    assert (found.num_rows, found.num_recordings) == (5, 5)
    rows = pq.read_table(found.manifest).to_pylist()
    for number, row in enumerate(rows):
        assert row["audio"] == f"{RECORDINGS}/{number:07d}-audio.wav"
        assert (tmp_path / "out" / row["audio"]).read_bytes() == wav(number)
        assert row["original_path"] == f"common_voice_ar_{number}.wav"
        assert (row["client_id"], row["locale"]) == (f"speaker-{number % 4}", "ar")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_the_manifest_can_be_prepared(tmp_path, capsys):
    common_voice(tmp_path / "train.parquet", range(12))
    out = tmp_path / "out"
    assert cli.main(["data", "unpack", str(tmp_path / "train.parquet"), "--out", str(out)]) == 0
    assert f"next: higgs-tune data prepare {out / MANIFEST}" in capsys.readouterr().out
    words = ["data", "prepare", str(out / MANIFEST), "--out", str(tmp_path / "prepared")]
    assert cli.main(words) == 0
    dataset = Dataset.open(str(tmp_path / "prepared"))
    assert dataset.info.num_rows == 12
    assert {dataset.row(n).text for n in range(12)} == {
        row["sentence"] for row in pq.read_table(out / MANIFEST).to_pylist()
    }


def test_a_second_run_writes_only_what_is_missing_or_differs(tmp_path):
    common_voice(tmp_path / "a.parquet", range(3))
    unpack([tmp_path / "a.parquet"], tmp_path / "out")
    whole, cut, lost = sorted((tmp_path / "out" / RECORDINGS).iterdir())
    before = whole.stat().st_mtime_ns
    cut.write_bytes(wav(1)[:-1] + b"x")  # of the same size
    lost.unlink()
    unpack([tmp_path / "a.parquet"], tmp_path / "out")
    assert whole.stat().st_mtime_ns == before
    assert (cut.read_bytes(), lost.read_bytes()) == (wav(1), wav(2))


def test_a_row_without_bytes_keeps_its_path_and_an_odd_name_gives_no_suffix(tmp_path):
    rows = [
        {"audio": {"bytes": None, "path": "elsewhere/a.wav"}, "text": "a"},
        {"audio": None, "text": "b"},
        {"audio": {"bytes": b"content", "path": "../../x.wav/../y. z"}, "text": "c"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = unpack([tmp_path / "a.parquet"], tmp_path / "out")
    paths = [row["audio"] for row in pq.read_table(found.manifest).to_pylist()]
    assert paths == ["elsewhere/a.wav", None, f"{RECORDINGS}/0000002-audio"]
    assert found.num_recordings == 1


def test_what_cannot_be_unpacked_is_one_clear_error(tmp_path):
    common_voice(tmp_path / "a.parquet", range(1))
    pq.write_table(pa.table({"path": ["a.wav"], "text": ["a"]}), tmp_path / "paths.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    (tmp_path / "file").write_text("")
    for names, out, message in (
        (
            ["paths.parquet"],
            "out",
            r"paths\.parquet: no column holds recordings.* found path, text",
        ),
        (
            ["a.parquet", "paths.parquet"],
            "out",
            r"paths\.parquet: its columns differ from those of",
        ),
        (["text.parquet"], "out", r"text\.parquet: cannot be read as Parquet"),
        (["none.parquet"], "out", r"none\.parquet: cannot be read as Parquet"),
        (["a.parquet"], "file", r"file: is a file, needed a folder|cannot be written"),
    ):
        with pytest.raises(DataError, match=message):
            unpack([tmp_path / name for name in names], tmp_path / out)
    assert not (tmp_path / "out").exists()
