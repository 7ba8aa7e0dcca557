"""Manifests of every kind become checked rows; unusable rows are rejected with their reason."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from higgs_tune.data.tasks import texts_of
from higgs_tune.errors import DataError
from tests.unit.data.manifests import SPOKEN, chat, jsonl, read, read_manifest, reason


def test_metadata_json_with_transcript_files_and_references(tmp_path: Path):
    (tmp_path / "a.txt").write_text(" Hello there.\n")
    samples = [
        {
            "id": "a",
            "audio_file": "a.wav",
            "transcript_file": "a.txt",
            "speaker_id": "s",
            "duration": 3.86,
            "task_type": "zero_shot_voice_cloning",
            "ref_audio_file": "b.wav",
        },
        {"id": "b", "audio_file": "b.wav", "text": "Reference.", "speaker_id": "s"},
        {"id": "c", "audio_file": "c.wav", "text": "c", "ref_audio_file": "d.wav"},
        {
            "id": "e",
            "audio_file": "e.wav",
            "text": "e",
            "ref_audio_file": "d.wav",
            "ref_transcript": "d",
        },
    ]
    found = read(tmp_path / "metadata.json", json.dumps({"dataset_info": {}, "samples": samples}))
    a, b, e = found.rows
    assert (a.text, a.audio, a.ref_text) == ("Hello there.", ("a.wav", "b.wav"), "Reference.")
    assert (b.audio, b.ref_text) == (("b.wav",), None)
    assert (e.audio, e.ref_text) == (("e.wav", "d.wav"), "d")
    assert [(r.id, r.path) for r in found.rejected] == [("c", "c.wav")]
    assert "reference recording without its text" in found.rejected[0].reason


@pytest.mark.parametrize("other", ["./b.wav", "sub/../b.wav", "{root}/b.wav"])
def test_a_reference_takes_its_recordings_text_however_its_path_is_spelled(
    tmp_path: Path, other: str
):
    rows = [
        {"path": "a.wav", "text": "x", "ref_audio": other.format(root=tmp_path)},
        {"path": "b.wav", "text": "Reference."},
    ]
    assert [row.ref_text for row in jsonl(tmp_path, *rows).rows] == ["Reference.", None]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # of the transcript file
def test_texts_and_speakers_are_normalised_to_nfc_but_paths_are_not(tmp_path: Path, encoding: str):
    words = [unicodedata.normalize("NFD", word) for word in ("إيمان", "آخر", "أنا")]
    speaker, text, path = words[0] + "  " + words[0], words[1], words[2] + ".wav"
    (tmp_path / "t.txt").write_text(text, encoding=encoding)
    rows = [
        {
            "id": path,
            "path": path,
            "text": text,
            "speaker": speaker,
            "ref_audio": f"sub/{path}",
            "ref_text": text,
        },
        {"path": path, "transcript_file": "t.txt", "client_id": speaker},
        chat(("user", [text]), ("assistant", {"type": "audio", "path": path}), speaker=speaker),
    ]
    found = jsonl(tmp_path, *rows).rows
    assert {row.speaker for row in found} == {"إيمان إيمان"}
    assert {text for row in found for text in texts_of(row.text, row.turns, row.ref_text)} == {
        "آخر"
    }
    assert {row.text for row in found} == {"آخر"}
    assert {name for row in found for name in row.audio} == {path, f"sub/{path}"}
    assert found[0].id == path


def test_a_text_does_not_keep_line_ends_or_the_mark_of_the_file_it_came_from(tmp_path: Path):
    text = "\ufeffسطر\r\nآخر"
    (tmp_path / "t.txt").write_bytes(text.encode())
    rows = [
        {"path": "a.wav", "text": text},
        {"path": "a.wav", "transcript_file": "t.txt"},
        chat(("user", text), SPOKEN),
    ]
    assert {row.text for row in jsonl(tmp_path, *rows).rows} == {"سطر\nآخر"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("ö".encode("latin-1"), "a.txt, line 1: byte 0xf6 is not UTF-8. Save it as UTF-8"),
        ("a".encode("utf-16-le"), "a.txt: is not UTF-8 but UTF-16"),
        ("مرحبا".encode("utf-16-le"), "a.txt: is not UTF-8 but UTF-16"),  # valid UTF-8, without NUL
        ("مرحبا".encode("utf-16-be"), "a.txt: is not UTF-8 but UTF-16"),
        (None, "a.txt: cannot be read (No such file"),
    ],
)
def test_an_unreadable_transcript_file_rejects_its_row(
    tmp_path: Path, content: bytes | None, message: str
):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    row = {"audio": "a.wav", "transcript_file": "a.txt"}
    assert message in reason(jsonl(tmp_path, row))


def test_a_transcript_file_outside_the_data_root_is_not_read(tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    row = {"audio": "a.wav", "transcript_file": "../secret.txt"}
    assert "outside the data root" in reason(jsonl(root, row))


def test_parquet_and_flat_jsonl_give_the_same_rows(tmp_path: Path):
    fields = [{"audio": {"path": "a.wav"}, "sentence": "eins", "client_id": "c", "locale": "de"}]
    pq.write_table(pa.Table.from_pylist(fields), tmp_path / "m.parquet")
    (from_parquet,) = read_manifest(tmp_path / "m.parquet", tmp_path, 2000).rows
    (from_jsonl,) = jsonl(tmp_path, *fields).rows
    assert from_parquet == from_jsonl
    assert (from_jsonl.audio, from_jsonl.text, from_jsonl.speaker) == (("a.wav",), "eins", "c")


@pytest.mark.parametrize(
    "row, message",
    [
        (chat(("tool", "x"), SPOKEN), "message 0 has role 'tool', needed one of system, user"),
        (chat(("user", "x"), ("assistant", "y")), "messages have no audio part"),
        (chat(("user", "x"), ("user", [SPOKEN[1]])), "no assistant message"),
        (chat(("user", "x"), SPOKEN, start_index=2), "start_index is 2, needed a number from 0 to"),
        (chat(("user", "x"), SPOKEN, ("user", "y"), start_index=2), "nothing to learn"),
        (chat(("user", "x"), SPOKEN, start_index="1"), "start_index is '1'"),
        (chat(("user", "x"), ("user", ["\u200f", "y"]), SPOKEN), "message 1: text is empty"),
        (chat(("system", "x"), ("scene", " "), SPOKEN), "message 1: text is empty"),
        (chat(("system", ["x", " "]), SPOKEN), "message 0: text is empty"),
        (
            chat(("user", "x"), ("scene", "y"), SPOKEN),
            "message 1 has role 'scene', which must be the first",
        ),
        (chat(("scene", "x"), ("scene", "y"), SPOKEN), "message 1 has role 'scene', which must be"),
        (chat(("user", []), SPOKEN), "message 0 is empty"),
        (
            {"path": "a.wav", "text": "x", "ref_audio": "b.wav", "ref_text": 2001 * "x"},
            "text has 2001 characters",
        ),
        (chat(("user", [{"type": "image"}]), SPOKEN), "part of type 'image'"),
        (chat(("user", 3), SPOKEN), "message 0 has a int"),
        (chat(("user", {"type": "audio", "raw_audio": "UklG"}), SPOKEN), "inside the manifest"),
        (chat(("user", {"type": "audio", "audio": "https://x/a.wav"}), SPOKEN), "not a local file"),
        (chat(("user", "<audio>"), SPOKEN, audios="a.wav"), "audios is str, needed a list"),
        (chat(("user", "<audio>"), SPOKEN, audios=["a", "b"]), "1 more paths than messages"),
        (chat(("user", "<audio><audio>"), SPOKEN, audios=["a"]), "more <audio> than audios"),
        (
            chat(("user", "<audio>"), ("user", "and <audio>"), SPOKEN, audios=["a"]),
            "message 1 has more <audio> than audios",
        ),
        (
            chat(("user", "x"), SPOKEN, ("user", "x"), SPOKEN),
            "trains on a.wav, which appears earlier",
        ),
        (chat(("user", {"type": "audio", "path": "b/../a.wav"}), SPOKEN), "trains on a.wav, which"),
        ({"messages": []}, "messages is not a list"),
        ({"messages": ["x"]}, "message 0 is str, needed role and content"),
        ({"text": "x"}, "has no audio: needed one of the fields path"),
        ({"audio": "a.wav"}, "has no text: needed one of the fields text"),
        ({"audio": "a.wav", "text": ["x"]}, "text is list, needed text"),
        ({"audio": "a.wav", "text": "   "}, "text is empty"),
        ({"audio": "a.wav", "text": "", "sentence": None}, "text is empty"),
        ({"audio": " ", "text": "x"}, "has no audio"),
        ({"audio": "a.wav", "text": "x" * 5000}, "text has 5000 characters, limit is 2000"),
        ({"audio": "a.wav", "text": "x \ud800"}, "half a surrogate pair"),
        ({"audio": "a.wav", "text": "x<|eot_id|>"}, "text holds the control token <|eot_id|>"),
        (chat(("user", "<|AUDIO_OUT|>"), SPOKEN), "text holds the control token <|AUDIO_OUT|>"),
        ({"audio": "a.wav", "text": "<|audio_bos|>x"}, "the control token <|audio_bos|>"),
        ({"audio": {"bytes": "UklG"}, "text": "x"}, "audio inside the manifest"),
        ({"audio": "a.wav", "text": "x", "split": "test"}, "split 'test' is not used"),
        (["a.wav", "x"], "found list, needed an object"),
    ],
)
def test_the_rejection_of_an_unusable_row_says_why(tmp_path: Path, row: Any, message: str):
    assert message in reason(jsonl(tmp_path, row))


def test_a_chat_may_hear_a_recording_after_learning_it(tmp_path: Path):
    turns = (("user", "x"), SPOKEN, ("user", SPOKEN[1]), ("assistant", "y"))
    assert len(jsonl(tmp_path, chat(*turns, start_index=1)).rows) == 1


def test_rejections_carry_line_id_and_path(tmp_path: Path):
    good = '{"id": "g", "audio": "g.wav", "text": "good \u2028 line"}'
    bad = '{"id": "b", "audio": "b.wav", "text": ""}'
    found = read(tmp_path / "m.jsonl", f"{good}\n\n{bad}\n{{oops\n")
    assert [row.number for row in found.rows] == [1]
    assert [(r.row, r.id, r.path) for r in found.rejected] == [(3, "b", "b.wav"), (4, None, None)]
    assert "line 4 is not JSON: Expecting property name" in found.rejected[1].reason


def test_duplicate_ids_keep_the_first_row(tmp_path: Path):
    found = jsonl(tmp_path, *({"id": "a", "audio": f"{n}.wav", "text": "x"} for n in range(3)))
    assert [row.audio for row in found.rows] == [("0.wav",)]
    assert {r.reason for r in found.rejected} == {
        "id 'a' is already used by row 1; ids must be unique"
    }
    assert [r.path for r in found.rejected] == ["1.wav", "2.wav"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.xlsx", b"", r"a manifest ends in one of \.jsonl, .*found '\.xlsx'"),
        ("m.csv", "path,text\na.wav,ok\nb.wav,caf\xe9\n".encode("latin-1"), r"line 3: byte 0xe9"),
        ("m.jsonl", b"\n", "found no rows"),
        ("m.csv", b"path,text\n", "found no rows"),
        ("m.json", b"{", "not JSON"),
        ("m.json", b"[" * 100_000, "not JSON"),
        ("m.json", b'{"rows": []}', "needed a list, or an object with the list `samples`"),
        ("m.parquet", b"PAR1", "cannot be read as Parquet"),
        ("m.csv", b'path,text\na.wav,"' + b"x" * 200_000 + b'"\n', "line .* not csv"),
    ],
)
def test_a_file_that_is_no_manifest_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
):
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


def test_a_missing_manifest_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing\.csv: no such file"):
        read_manifest(tmp_path / "nothing.csv", tmp_path, 10)


@pytest.mark.parametrize("name", ["offset", "start", "start_time"])
def test_a_row_for_part_of_a_recording_is_rejected(tmp_path: Path, name: str):
    row = {"audio_filepath": "a.wav", "text": "x", "duration": 3.2}
    assert rf"{name} is 12.5: only whole recordings are read" in reason(
        jsonl(tmp_path, row | {name: 12.5})
    )
    part = SPOKEN[1] | {name: 12.5}
    assert name in reason(jsonl(tmp_path, chat(("user", "x"), ("assistant", part))))
    for whole in (0, 0.0, None, float("nan"), "", "0", "0.0", " 0.000", "00:00:00.000", "0,0"):
        assert len(jsonl(tmp_path, row | {name: whole}).rows) == 1


@pytest.mark.parametrize("other", ["a.wav", "./a.wav", "sub/../a.wav", "{root}/a.wav"])
def test_a_recording_cannot_be_its_own_reference(tmp_path: Path, other: str):
    row = {"path": "a.wav", "text": "x", "ref_text": "x", "ref_audio": other.format(root=tmp_path)}
    assert "has its own recording as its reference" in reason(jsonl(tmp_path, row))
    assert len(jsonl(tmp_path, row | {"ref_audio": "b.wav"}).rows) == 1


def test_speaker_names_that_look_equal_are_one_speaker(tmp_path: Path):
    names = ("أحمد", "\u200fأحمد\u200f", "أح\u200dمد", "\ufeffأحمد ")
    rows = [{"path": f"{n}.wav", "text": "x", "speaker": name} for n, name in enumerate(names)]
    assert {row.speaker for row in jsonl(tmp_path, *rows).rows} == {"أحمد"}


def test_a_text_of_only_invisible_marks_is_empty(tmp_path: Path):
    row = {"path": "a.wav", "text": "\u200f\u202b\ufeff"}
    assert reason(jsonl(tmp_path, row)) == "text is empty"
