"""Manifests that are tables (CSV, TSV, Parquet): quoting, columns, blank cells."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from higgs_tune.errors import DataError
from tests.unit.data.manifests import Manifest, read_manifest


def read(path: Path, content: str, encoding: str = "utf-8") -> Manifest:
    path.write_bytes(content.encode(encoding))
    return read_manifest(path, path.parent, 2000)


def test_csv_with_and_without_the_optional_columns(tmp_path: Path):
    text = "id,path,text,speaker,split,language\nx,a.wav,Hallo,anna,dev,de\ny,b.wav,ja,7,train,\n"
    first, second = read(tmp_path / "m.csv", "\ufeff" + text).rows
    assert (first.id, first.audio, first.text, first.speaker) == ("x", ("a.wav",), "Hallo", "anna")
    assert (first.split, first.language, first.kind) == ("validation", "de", "clip")
    assert (second.split, second.language, second.speaker) == ("train", None, "7")
    (plain,) = read(tmp_path / "n.tsv", "Audio_File\tTranscript\na.wav\tOne, two\n").rows
    assert (plain.id, plain.text, plain.speaker, plain.split) == ("row000002", "One, two", "", None)


def test_csv_rows_with_too_many_or_too_few_fields_are_rejected(tmp_path: Path):
    found = read(tmp_path / "m.csv", "path,text\na.wav,one,two\nb.wav\nc.wav,ok\n")
    assert [row.audio for row in found.rows] == [("c.wav",)]
    assert [r.reason for r in found.rejected] == [
        "line 2 has more fields than the first line names",
        "line 3 has fewer fields than the first line names",
    ]


def test_csv_without_the_needed_columns_is_an_error(tmp_path: Path):
    with pytest.raises(
        DataError,
        match=r"columns a\.wav, hello; needed one of path, .*, semicolons, tabs or \| between",
    ):
        read(tmp_path / "m.csv", "a.wav,hello\n")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ljspeech_metadata_needs_no_header_line(tmp_path: Path, encoding: str):
    content = (
        'LJ-1|Dr. A, "one", two, three|Doctor A, "one", two, three\n'
        'LJ-2|"So it begins|"So it begins\n'
        "LJ-3|3 cats|three cats|odd\n"
        "LJ-4|4 cats|four cats\n"
    )
    found = read(tmp_path / "metadata.csv", content, encoding)
    assert [(row.number, row.id, row.audio, row.text) for row in found.rows] == [
        (1, "LJ-1", ("wavs/LJ-1.wav",), 'Doctor A, "one", two, three'),
        (2, "LJ-2", ("wavs/LJ-2.wav",), '"So it begins'),
        (4, "LJ-4", ("wavs/LJ-4.wav",), "four cats"),
    ]
    assert [r.reason for r in found.rejected] == [
        "line 3 has more fields than the first line names"
    ]
    (row,) = read(tmp_path / "short.csv", "a1|صباح الخير\n").rows
    assert (row.audio, row.text) == (("wavs/a1.wav",), "صباح الخير")


def test_bar_separated_files_have_a_header_and_no_quoting(tmp_path: Path):
    named = (
        'audio_file|text|speaker_name\nwavs/a.wav|"Ja, sagte er|anna\nwavs/b.wav|Nein, "nie"|bo\n'
    )
    found = read(tmp_path / "m.csv", named)
    assert [(row.audio[0], row.text, row.speaker) for row in found.rows] == [
        ("wavs/a.wav", '"Ja, sagte er', "anna"),
        ("wavs/b.wav", 'Nein, "nie"', "bo"),
    ]
    with pytest.raises(
        DataError, match=r"columns a\.wav, hello, anna; needed .* tabs or \| between"
    ):
        read(tmp_path / "n.csv", "a.wav|hello|anna\n")


@pytest.mark.parametrize("names", ["id|text|speaker", "file_id|Transcript", "utterance|speaker_id"])
def test_a_bar_separated_header_without_an_audio_column_is_an_error(tmp_path: Path, names: str):
    """Taken for a row of LJSpeech, it would make each row's last column, the speaker, its text."""
    row = "a1|hello|anna\n" if names.count("|") == 2 else "a1|hello\n"
    with pytest.raises(DataError, match=r"the first line names the columns .*; needed one of path"):
        read(tmp_path / "m.csv", f"{names}\n{row}")


@pytest.mark.parametrize("comma", [",", ";", "\t"])
def test_a_bar_in_a_column_name_is_no_separator(tmp_path: Path, comma: str):
    table = f"path{comma}text{comma}lang|accent\na.wav{comma}one|two{comma}de\n"
    (row,) = read(tmp_path / "m.csv", table).rows
    assert (row.audio, row.text) == (("a.wav",), "one|two")


@pytest.mark.parametrize("comma", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_is_read_as_spreadsheets_write_it(tmp_path: Path, comma: str, encoding: str):
    table = f'\r\npath{comma}text\r\na.wav{comma}"صباح; one,\ttwo"\r\n'
    (row,) = read(tmp_path / "m.csv", table, encoding).rows
    assert (row.number, row.audio, row.text) == (3, ("a.wav",), "صباح; one,\ttwo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,text\na.wav,ok\nb.wav,ö\n".encode("latin-1"), "line 3: byte 0xf6 is not UTF-8"),
        ("path,text\n".encode("utf-16-le"), "is not UTF-8 but UTF-16"),
        ("path,text\n".encode("utf-16") + b"a", r"begins as UTF-16 .* \(truncated data\)"),
    ],
)
def test_the_error_for_another_encoding_says_what_to_do(
    tmp_path: Path, content: bytes, message: str
):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(DataError, match=message + r".*\. Save it as UTF-8: .* Excel"):
        read_manifest(tmp_path / "m.csv", tmp_path, 2000)


@pytest.mark.parametrize("name, comma", [("m.csv", ","), ("m.tsv", "\t")])
def test_duplicate_columns_are_an_error(tmp_path: Path, name: str, comma: str):
    rows = "path,text,speaker, Text,,\na.wav,hello,anna,other,,\n".replace(",", comma)
    with pytest.raises(DataError, match=r"m\.[ct]sv: has several columns named text\. Rename"):
        read(tmp_path / name, rows)


def test_quotation_marks_in_tsv_are_plain_text(tmp_path: Path):
    texts = ['"Ja, sagte er.', '"Nein".', 'Er sagte "ja"', '"Ja"', '""', 'a ""b""', '"', "it's"]
    lines = [f"{n}.wav\t{text}\tanna\n" for n, text in enumerate(texts)]
    found = read(tmp_path / "m.tsv", "path\tsentence\tclient_id\n" + "".join(lines))
    assert [(row.audio[0], row.text) for row in found.rows] == [
        (f"{n}.wav", text) for n, text in enumerate(texts)
    ]
    assert {row.speaker for row in found.rows} == {"anna"}


def test_csv_quoting_in_a_tsv_gives_no_wrong_transcript(tmp_path: Path):
    quoted = 'path\ttext\na.wav\t"""Ja"", sagte er"\nb.wav\tNein\n'
    found = read(tmp_path / "m.tsv", quoted)
    assert [row.text for row in found.rows] == ["Nein"]
    assert [r.reason for r in found.rejected] == [
        "line 2 has a text quoted as in CSV. TSV files and files separated by | have no quoting: write "
        "this file as .csv with commas, or the text without quotes."
    ]
    broken = 'path\ttext\na.wav\tJa\nb.wav\t"first\nsecond"\nc.wav\tNein\n'
    with pytest.raises(DataError, match=r"m\.tsv, line 4: continues a quoted text of the line"):
        read(tmp_path / "m.tsv", broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('path,text\na.wav,ok\nb.wav,"Ja" sagte er\n', r"line 3: not csv \(',' expected after"),
        ('path,text\na.wav,ok\nb.wav,"Ja\nc.wav,x\n', r"line 3: not csv \(unexpected end of data"),
        ('"path"x,text\na.wav,ok\n', r"line 1: not csv .* those inside it must be doubled"),
    ],
)
def test_the_error_for_a_stray_quotation_mark_names_its_line(
    tmp_path: Path, content: str, message: str
):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "m.csv", content)


def test_quoted_csv_texts_may_hold_commas_quotes_and_line_breaks(tmp_path: Path):
    found = read(
        tmp_path / "m.csv", 'path,text\r\n\r\na.wav,"one, ""two""\r\nthree"\r\nb.wav,x\r\n'
    )
    assert [row.text for row in found.rows] == ['one, "two"\nthree', "x"]
    assert [row.number for row in found.rows] == [3, 5]  # the lines as an editor counts them


def test_a_blank_cell_is_filled_from_a_synonymous_column(tmp_path: Path):
    (tmp_path / "a.txt").write_text("from the file")
    table = "id,utt_id,path,file,text,sentence,transcript_file,ref_audio,ref_text,ref_transcript\n"
    rows = [",x,,a.wav, ,,a.txt,,,", "y,,b.wav,, ,other,a.txt,,,", "z,,c.wav,,c,,,d.wav, ,d"]
    found = read(tmp_path / "m.csv", table + "\n".join(rows))
    assert not found.rejected
    assert [(row.id, row.audio, row.text, row.ref_text) for row in found.rows] == [
        ("x", ("a.wav",), "from the file", None),
        ("y", ("b.wav",), "other", None),
        ("z", ("c.wav", "d.wav"), "c", "d"),
    ]
    both = {"audio": "a.wav", "text": "", "transcript_file": "a.txt"}
    assert [row.text for row in read(tmp_path / "m.jsonl", json.dumps(both)).rows] == [
        "from the file"
    ]


def test_a_blank_reference_text_is_taken_from_the_recordings_own_row(tmp_path: Path):
    (tmp_path / "blank.txt").write_text(" \n")
    content = (
        "path,text,ref_audio,ref_text,ref_text_file\n"
        "a.wav,Ja,b.wav,,\nb.wav,Nein,,,\nc.wav,So,b.wav, ,blank.txt\nd.wav,Doch,e.wav,,\n"
    )
    found = read(tmp_path / "m.csv", content)
    assert [(row.text, row.ref_text) for row in found.rows] == [
        ("Ja", "Nein"),
        ("Nein", None),
        ("So", "Nein"),
    ]
    assert [
        (r.path, "reference recording without its text" in r.reason) for r in found.rejected
    ] == [("d.wav", True)]


def test_audio_inside_a_parquet_file_is_rejected_with_advice(tmp_path: Path):
    audio = {"bytes": b"RIFF", "path": "a.wav"}
    pq.write_table(pa.Table.from_pylist([{"audio": audio, "text": "x"}]), tmp_path / "m.parquet")
    (rejection,) = read_manifest(tmp_path / "m.parquet", tmp_path, 2000).rejected
    assert "audio inside the manifest is not supported" in rejection.reason
    assert "write its bytes to a file" in rejection.reason


def test_integers_that_pandas_wrote_as_floats_are_read_as_integers(tmp_path: Path):
    rows = [
        {"id": 7.0, "speaker": 12.0, "path": "a.wav", "text": "x", "split": float("nan")},
        {"id": float("nan"), "speaker": float("nan"), "path": "b.wav", "text": "y", "split": None},
        {"id": 8.5, "speaker": 1.0, "path": "c.wav", "text": "z", "split": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    found = read_manifest(tmp_path / "m.parquet", tmp_path, 2000)
    assert [(row.id, row.speaker, row.split) for row in found.rows] == [
        ("7", "12", None),
        ("row000002", "", None),
    ]
    assert found.rejected[0].reason == "id is float, needed text"
