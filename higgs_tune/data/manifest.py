"""Manifests: what a person wrote about their recordings, read into checked rows.

A row that cannot be used is returned as a rejection with its reason; a file that cannot be read as
what its name says is an error. Audio itself is not touched here.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from higgs_tune.data.messages import chat_row, clip_from_chat
from higgs_tune.data.rows import (
    ID,
    LANGUAGE,
    PATH,
    REF_AUDIO,
    REF_TEXT,
    REF_TEXT_FILE,
    SPEAKER,
    SPLIT,
    TEXT,
    TEXT_FILE,
    ManifestRow,
    Rejection,
    audio_path,
    field,
    text_problem,
)
from higgs_tune.errors import DataError

_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
}


@dataclass(frozen=True)
class Manifest:
    """The rows of a manifest, and those that cannot be used."""

    rows: tuple[ManifestRow, ...]
    rejected: tuple[Rejection, ...]

    @property
    def num_total(self) -> int:
        """Rows that the file holds."""
        return len(self.rows) + len(self.rejected)


def read_manifest(
    path: Path, data_root: Path, max_text_chars: int, clips_from_chat: bool = False
) -> Manifest:
    """Read ChatML JSONL, `metadata.json`, CSV, TSV or Parquet, told apart by the file's ending.

    Args:
        data_root: folder that transcript files are relative to.
        max_text_chars: longest text of one part.
        clips_from_chat: chats that only wrap a recording and its text become clips.

    Raises:
        DataError: no such file, an ending or an encoding that is not understood, no rows.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": lambda path: _read_table(path, ","),
        ".tsv": lambda path: _read_table(path, "\t"),
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: a manifest ends in one of {', '.join(readers)}, found {path.suffix!r}. "
            "docs/howto/data.md shows each kind."
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the path of a manifest.")
    rows: list[ManifestRow] = []
    rejected: list[Rejection] = []
    references = _Transcripts()
    for number, fields in reader(path):
        try:
            if isinstance(fields, DataError):
                raise fields
            row = _row(number, fields, data_root)
            if clips_from_chat and row.kind == "chat":
                row = clip_from_chat(row)
            references.add(row)
            rows.append(row)
        except DataError as problem:
            rejected.append(_rejection(number, fields, str(problem)))
    if not rows and not rejected:
        raise DataError(f"{path}: found no rows. A manifest has at least one recording with text.")
    kept: list[ManifestRow] = []
    first_of_id: dict[str, int] = {}
    for row in map(references.complete, rows):
        problem = _problem(row, max_text_chars)
        if row.id in first_of_id:
            problem = f"id {row.id!r} is already that of row {first_of_id[row.id]}; ids are unique"
        first_of_id.setdefault(row.id, row.number)
        if problem:
            rejected.append(Rejection(row.number, row.id, row.audio[0], problem))
        else:
            kept.append(row)
    return Manifest(tuple(kept), tuple(sorted(rejected, key=lambda rejection: rejection.row)))


def _problem(row: ManifestRow, max_text_chars: int) -> str | None:
    if row.kind == "clip" and len(row.audio) == 2 and row.ref_text is None:
        return (
            "has a reference recording without its text: add ref_transcript, or a row of its own "
            "for that recording"
        )
    texts = row.texts()
    return next(filter(None, (text_problem(text, max_text_chars) for text in texts)), None)


def _row(number: int, fields: Any, data_root: Path) -> ManifestRow:
    """One row from its fields, whichever kind of file they came from."""
    if not isinstance(fields, Mapping):
        raise DataError(f"found {type(fields).__name__}, needed an object with fields")
    identity = {
        "number": number,
        "id": field(fields, ID) or f"row{number:06d}",
        "split": _split(field(fields, SPLIT)),
        "speaker": field(fields, SPEAKER) or "",
        "language": field(fields, LANGUAGE),
    }
    if fields.get("messages") is not None:
        return chat_row(fields, identity)
    path = audio_path(fields, PATH)
    if path is None:
        raise DataError(f"has no audio: needed one of the fields {', '.join(PATH)}, or messages")
    text = _text(fields, TEXT, TEXT_FILE, data_root)
    if text is None:
        raise DataError(f"has no text: needed one of the fields {', '.join(TEXT + TEXT_FILE)}")
    reference = audio_path(fields, REF_AUDIO)
    return ManifestRow(
        **identity,
        kind="clip",
        text=text,
        audio=(path,) if reference is None else (path, reference),
        ref_text=reference and _text(fields, REF_TEXT, REF_TEXT_FILE, data_root),
    )


def _split(name: str | None) -> str | None:
    if name is None:
        return None
    if name.lower() not in _SPLIT_NAMES:
        raise DataError(f"split {name!r} is not used here: needed train or validation")
    return _SPLIT_NAMES[name.lower()]


def _text(
    fields: Mapping[str, Any], names: tuple[str, ...], file_names: tuple[str, ...], data_root: Path
) -> str | None:
    """The text, from its field or from the file that a field names."""
    text = field(fields, names, keep_empty=True)
    if text is not None:
        return text
    name = audio_path(fields, file_names)
    if name is None:
        return None
    path = data_root / name
    try:
        if not path.resolve().is_relative_to(data_root.resolve()):
            raise DataError(f"transcript file {name} is outside the data root")
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"transcript file {name} is not UTF-8 (byte {error.start})") from None
    except (OSError, ValueError) as error:
        raise DataError(f"transcript file {name} cannot be read ({_short(error)})") from None


class _Transcripts:
    """Texts of clips by path, for references that name a recording but not its text."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def add(self, row: ManifestRow) -> None:
        if row.kind == "clip":
            self._texts.setdefault(row.audio[0], row.text)

    def complete(self, row: ManifestRow) -> ManifestRow:
        if row.kind == "chat" or len(row.audio) < 2 or row.ref_text is not None:
            return row
        return replace(row, ref_text=self._texts.get(row.audio[1]))


def _rejection(number: int, fields: Any, reason: str) -> Rejection:
    def plain(names: tuple[str, ...]) -> str | None:
        found = (fields.get(name) for name in names) if isinstance(fields, Mapping) else iter(())
        value = next((value for value in found if isinstance(value, str)), None)
        return value and value.encode("utf-8", "replace").decode("utf-8")

    return Rejection(number, plain(ID), plain(PATH), reason)


def _short(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8. "
            "Save the manifest as UTF-8 (`iconv -f OLD -t UTF-8`)."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_short(error)}).") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line of JSONL: U+2028 and its like may stand inside a string.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, DataError(f"line {number} is not JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        raw = json.loads(_decode(path))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}). A file with one object a line ends in .jsonl."
        ) from None
    samples = raw.get("samples") if isinstance(raw, dict) else raw
    if not isinstance(samples, list):
        raise DataError(f"{path}: needed a list, or an object with the list `samples`.")
    yield from enumerate(samples, start=1)


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(_decode(path), newline=""), delimiter=delimiter)
    names = [name.strip().lower() for name in reader.fieldnames or []]
    if not (set(names) & set(PATH) and set(names) & set(TEXT + TEXT_FILE)):
        raise DataError(
            f"{path}: the first line names the columns {names}; needed one of {PATH} and one of "
            f"{TEXT + TEXT_FILE}."
        )
    reader.fieldnames = names
    rows = iter(reader)
    number = 0
    while True:
        number += 1
        try:
            fields: Any = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: not {path.suffix[1:]} ({error})."
            ) from None
        if None in fields:
            fields = DataError(f"line {reader.line_num} has more fields than the first line names")
        elif None in fields.values():
            fields = DataError(f"line {reader.line_num} has fewer fields than the first line names")
        yield number, fields


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows: Iterable[Any] = pq.read_table(path).to_pylist()
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}).") from None
    yield from enumerate(rows, start=1)
