"""Preparing a dataset again, after a run that stopped or after its inputs changed."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import soundfile

from higgs_tune.data import encode
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.files import writing
from higgs_tune.data.shards import Row, list_shards
from higgs_tune.errors import DataError
from higgs_tune.files import replace_file
from tests.unit.data.recordings import RATE_HZ, content, make_root, rejected, speech, spy


def all_rows(out: Path) -> list[Row]:
    dataset = Dataset.open(str(out))
    return [dataset.row(index) for index in range(dataset.info.num_rows)]


def test_fixed_recordings_reuse_finished_shards_but_a_fixed_manifest_is_refused(
    tmp_path: Path, run, monkeypatch
):
    rows = make_root(tmp_path / "root", 8)
    (tmp_path / "root" / "2.wav").write_bytes(b"no audio")
    with pytest.raises(DataError, match="1 of 8 rows are rejected"):
        run(rows, max_rejected=0)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest rows changed since\. Give another --out"):
        run([*rows[:2], *rows[3:]], max_rejected=0)
    assert content(tmp_path / "out") == before
    soundfile.write(tmp_path / "root" / "2.wav", speech(9), RATE_HZ)
    seen = spy(monkeypatch)
    assert run(rows, max_rejected=0).num_rows == 8
    assert len(seen) == 4, "the other shard is not touched"


def test_a_fixed_manifest_is_prepared_if_nothing_was_encoded_yet(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    with pytest.raises(DataError, match="1 of 6 rows are rejected"):
        run([rows[0] | {"text": ""}, *rows[1:]], max_rejected=0)
    assert run(rows, max_rejected=0).num_rows == 6


def test_a_fixed_manifest_is_prepared_if_every_recording_was_unusable(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 10)
    bad = [row | {"path": f"bad{row['path']}"} for row in rows]
    for row in bad:
        (tmp_path / "root" / row["path"]).write_bytes(b"no audio")
    with pytest.raises(DataError, match=r"10 of 10 rows .* Fix the manifest or the recordings"):
        run(bad, max_rejected=0)
    assert len(list_shards(tmp_path / "out")) == 3
    run(rows[:6], "fresh", max_rejected=0)
    assert run(rows[:6], max_rejected=0).num_rows == 6
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_temporarily_missing_recordings_leave_finished_shards_intact(
    tmp_path: Path, run, monkeypatch
):
    rows = make_root(tmp_path / "root", 8)
    run(rows)
    before = content(tmp_path / "out")
    for row in rows:
        (tmp_path / "root" / row["path"]).rename(tmp_path / row["path"])
    with pytest.raises(DataError, match="8 of 8 rows are rejected"):
        run(rows)
    for row in rows:
        (tmp_path / row["path"]).rename(tmp_path / "root" / row["path"])
    seen = spy(monkeypatch)
    run(rows)
    assert not seen
    assert content(tmp_path / "out") == before


def test_a_fixed_recording_is_encoded_on_the_next_run(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 12)
    good = (tmp_path / "root" / "5.wav").read_bytes()
    (tmp_path / "root" / "5.wav").write_bytes(b"")
    assert run(rows, max_rejected=1).num_rows == 11
    (tmp_path / "root" / "5.wav").write_bytes(good)
    seen = spy(monkeypatch)
    assert run(rows, max_rejected=1).num_rows == 12
    assert len(seen) == 4, "the other two shards are not touched"
    assert rejected(tmp_path / "out") == {}


def test_changed_recordings_and_deleted_shards_are_encoded_again(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 12)
    first, second = (tmp_path / "root" / name for name in ("0.wav", "4.wav"))
    run(rows)
    stat = second.stat()
    soundfile.write(first, speech(20), RATE_HZ)  # of the same size
    soundfile.write(second, speech(21, 0.3), RATE_HZ)
    os.utime(second, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # with the old time stamp
    seen = spy(monkeypatch)
    run(rows)
    assert len(seen) == 8, "the last shard is not touched"
    run(rows, "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    seen.clear()
    list_shards(tmp_path / "out")[2].unlink()
    run(rows)
    assert len(seen) == 4
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_temporarily_unreadable_recording_is_read_on_the_next_run(
    tmp_path: Path, run, monkeypatch
):
    rows, real = make_root(tmp_path / "root", 8), Path.open

    def forbidden(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "5.wav":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden)
        with pytest.raises(DataError, match=r"1 of 8 rows .*cannot be opened: Permission denied"):
            run(rows, max_rejected=0)
    seen = spy(monkeypatch)
    assert run(rows, max_rejected=0).num_rows == 8
    assert len(seen) == 4, "the other shard is not touched"


def test_a_recording_that_the_disk_failed_to_give_is_read_on_the_next_run(
    tmp_path: Path, run, monkeypatch
):
    rows = make_root(tmp_path / "root", 8)

    def fail(*_: Any, **__: Any) -> None:
        raise soundfile.LibsndfileError(2)  # what libsndfile makes of EIO, ESTALE and the like

    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", fail)
        with pytest.raises(DataError, match=r"8 of 8 rows .*cannot be opened: System error"):
            run(rows, max_rejected=0)
    assert run(rows, max_rejected=0).num_rows == 8


def test_a_shard_with_a_broken_recording_is_not_encoded_again(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 8)
    (tmp_path / "root" / "5.wav").write_bytes(b"no audio")
    with pytest.raises(DataError, match="1 of 8 rows are rejected"):
        run(rows, max_rejected=0)
    seen = spy(monkeypatch)
    with pytest.raises(DataError, match="1 of 8 rows are rejected"):
        run(rows, max_rejected=0)
    assert not seen


@pytest.mark.parametrize("stop_after", [0, 3, 4, 9])
def test_an_interrupted_run_resumes_and_gives_the_same_bytes(
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


def test_a_run_that_leaves_more_rows_out_keeps_no_shard_of_the_run_before(tmp_path: Path, run):
    spoken = {"role": "assistant", "content": {"type": "audio", "audio_url": "link.wav"}}
    messages = [{"role": "user", "content": "Say it."}, spoken]
    clips = make_root(tmp_path / "root", 6)
    rows = [{"id": "chat", "messages": messages}, *clips]
    run(rows, rows_per_shard=1, max_rejected=1)
    held_out = next(row.id for row in all_rows(tmp_path / "out") if row.split == "validation")
    # now the chat teaches a validation recording, and is left out
    (tmp_path / "root" / "link.wav").symlink_to(f"{held_out[1:]}.wav")
    run(rows, rows_per_shard=1, max_rejected=1)
    assert [row.id for row in all_rows(tmp_path / "out")] == [row["id"] for row in clips]


def test_only_drafts_of_a_killed_run_are_deleted(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    run(rows, "root")
    drafts = [tmp_path / "root" / name for name in (".dataset.json.1.tmp", "shards/.a.2.tmp")]
    others = [tmp_path / "root" / name for name in ("notes.tmp", "takes/.1.tmp")]
    (tmp_path / "root" / "takes").mkdir()
    for path in (*drafts, *others):
        path.write_text("content")
    run(rows, "root")
    assert [path.exists() for path in (*drafts, *others)] == [False, False, True, True]


def test_a_folder_of_other_data_is_left_alone(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 6)
    run(rows)
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match=r"was prepared differently: max_seconds changed since"):
        run(rows, max_seconds=20)
    with pytest.raises(DataError, match=r"was prepared differently: manifest rows changed since"):
        run([*rows[:5], rows[5] | {"text": "other"}])
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "prepare.json").unlink()
    with pytest.raises(DataError, match="holds a dataset that this command did not make"):
        run(rows)


def test_max_rejected_may_be_raised_for_a_prepared_folder(tmp_path: Path, run):
    rows = make_root(tmp_path / "root", 8)
    (tmp_path / "root" / rows[0]["path"]).unlink()
    with pytest.raises(DataError, match="1 of 8 rows"):
        run(rows, max_rejected=0)
    assert run(rows, max_rejected=3).num_rows == 7


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_finished_shards_stay(tmp_path: Path, run, monkeypatch, code: int):
    rows = make_root(tmp_path / "root", 8)
    real = encode.write_shard

    def full(path: Path, *args: Any) -> None:
        if path.name == "part-00001.parquet":

            def fill(temporary: Path) -> None:
                temporary.write_bytes(b"half")
                raise OSError(code, os.strerror(code))

            with writing(path):
                replace_file(path, fill)
        real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "write_shard", full)
        with pytest.raises(DataError, match=r"part-00001\.parquet: no space left on the disk"):
            run(rows)
    left = {path.name for path in (tmp_path / "out" / "shards").iterdir()}
    assert left == {"part-00000.parquet", "part-00000.json"}
    assert run(rows).num_rows == 8


def test_an_out_path_that_is_a_file_is_refused_before_encoding(tmp_path: Path, run, monkeypatch):
    rows = make_root(tmp_path / "root", 4)
    (tmp_path / "out").write_text("a file")
    seen = spy(monkeypatch)
    with pytest.raises(DataError, match=r"out: is a file, needed a folder"):
        run(rows)
    assert seen == []
