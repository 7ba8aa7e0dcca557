"""Read each format of manifest row by row, so that memory does not grow with the file.

`metadata.json` is the exception: a JSON document is parsed as a whole.
"""

import csv
import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from higgs_tune.data.rows import ID, PATH, SPEAKER, TEXT, TEXT_FILE
from higgs_tune.errors import DataError

_LJSPEECH = ("id", "transcript", "text")  # `text` is normalised and may be missing
_TAB = 9  # no text begins with a control character below it
_PARQUET_ROWS = 1024  # decoded at a time
_PARQUET_BUFFER = 2**20  # bytes of a column read at a time: a row group may hold a million rows
_AS_UTF8 = 'Save it as UTF-8: "CSV UTF-8" in Excel, `iconv -f OLD -t UTF-8` in a shell.'
_NO_QUOTES = (
    "TSV files and files separated by | have no quoting: write this file as .csv with commas, or the text "
    "without quotes."
)
_QUOTES = "A field that begins with a quotation mark must end with one, and those inside it must be doubled."


def read_fields(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield each row's number and its fields, or a DataError if the row is malformed.

    The number is the line where the row begins in a JSONL, CSV or TSV file, else its position from 1.

    Raises:
        DataError: no such file, an unknown extension or encoding, or another format than the extension's.
    """
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_table,
        ".tsv": _read_table,
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
    return reader(path)


def encoding_of(path: Path) -> str:
    """Return the file's encoding after checking all of it: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        DataError: the file is neither, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                with path.open(encoding="utf-16", newline="\n") as text:
                    for _ in text:
                        pass
                return "utf-16"
            if min(head, default=_TAB) < _TAB:  # half of the first letter; NUL only in ASCII's
                raise DataError(f"{path}: is not UTF-8 but UTF-16 or UTF-32. {_AS_UTF8}")
            file.seek(0)
            for line, raw in enumerate(file, start=1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. {_AS_UTF8}"
                    ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: begins as UTF-16 but is not valid UTF-16 ({error.reason}). {_AS_UTF8}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from None
    return "utf-8-sig"


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    encoding = encoding_of(path)
    # Only \n ends a line of JSONL: U+2028 and the like may occur inside a string.
    with path.open(encoding=encoding, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.removesuffix("\n"))
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"line {number} is not JSON: {error}")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    encoding = encoding_of(path)
    try:
        raw = json.loads(path.read_text(encoding))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}). A file with one object per line must end in .jsonl."
        ) from None
    samples = raw.get("samples") if isinstance(raw, dict) else raw
    if not isinstance(samples, list):
        raise DataError(f"{path}: needed a list, or an object with the list `samples`.")
    yield from enumerate(samples, start=1)


def _read_table(path: Path) -> Iterator[tuple[int, Any]]:
    is_tsv = path.suffix.lower() == ".tsv"
    with path.open(encoding=encoding_of(path), newline="") as file:
        delimiter = "\t" if is_tsv else _delimiter(file)
        has_bars = delimiter == "|"
        has_quotes = not is_tsv and not has_bars
        rows = _cells(path, file, delimiter, has_quotes)
        first = next(rows, (0, []))
        names = [name.strip().lower() for name in first[1]]
        names_columns = set(names) & set(PATH) and set(names) & set(TEXT + TEXT_FILE)
        is_ljspeech = not names_columns and has_bars and _is_ljspeech(first[1], names)
        if is_ljspeech:
            names, rows = list(_LJSPEECH[: len(names)]), chain([first], rows)
        elif not names_columns:
            raise DataError(
                f"{path}: the first line names the columns {', '.join(names)}; needed one of "
                f"{', '.join(PATH)} and one of {', '.join(TEXT + TEXT_FILE)}, with "
                f"{'tabs' if is_tsv else 'commas, semicolons, tabs or |'} between them."
            )
        _check_names(path, [name for name in names if name])
        before: list[str] = []
        for line, cells in rows:
            fields: Any = dict(zip(names, cells, strict=False))
            if not has_quotes and len(cells) < len(names) and any(map(_opens_quote, before)):
                raise DataError(
                    f"{path}, line {line}: continues a quoted text of the line before. {_NO_QUOTES}"
                )
            if len(cells) != len(names):
                more = "more" if len(cells) > len(names) else "fewer"
                fields = DataError(f"line {line} has {more} fields than the first line names")
            elif not has_quotes and any(map(_is_quoted, cells)):
                fields = DataError(f"line {line} has a text quoted as in CSV. {_NO_QUOTES}")
            elif is_ljspeech:
                fields["path"] = f"wavs/{cells[0]}.wav"
            yield line, fields
            before = cells


def _is_ljspeech(cells: Sequence[str], names: Sequence[str]) -> bool:
    """Whether the first line is a row of LJSpeech's metadata.csv: a name in wavs/ and one or two texts.

    A line of column names such as `id|text|speaker` is not: its speakers would be read as texts.
    """
    has_names = not {*ID, *TEXT, *SPEAKER}.isdisjoint(names)
    return 2 <= len(cells) <= len(_LJSPEECH) and Path(cells[0]).suffix == "" and not has_names


def _cells(
    path: Path, file: TextIO, delimiter: str, has_quotes: bool
) -> Iterator[tuple[int, list[str]]]:
    """Yield the line where each row begins, and the row's cells; blank lines are left out.

    TSV (Common Voice) and `|` (LJSpeech) are read without quoting: otherwise a text that begins with a
    quotation mark would swallow the rows that follow.
    """
    quoting = csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE
    reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=has_quotes)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: not {path.suffix[1:]} ({error})."
                + (f" {_QUOTES}" if has_quotes else "")
            ) from None
        if cells:
            yield line, cells


def _delimiter(file: TextIO) -> str:
    """Return the most frequent of comma, semicolon and tab in the first line, or `|` if it comes first.

    Spreadsheets write semicolons where the decimal separator is a comma. `|` goes by position, not by
    count: the first line may hold a text with many commas, and the column names of a CSV may contain a `|`.
    """
    first = next(filter(str.strip, file), "")
    file.seek(0)
    return "|" if re.match(r"[^,;\t]*\|", first) else max(",;\t", key=first.count)


def _check_names(path: Path, names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{path}: has several columns named {', '.join(twice)}. Rename all but one of each."
        )


def _opens_quote(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _is_quoted(cell: str) -> bool:
    """Whether a CSV writer quoted the cell, which shows in its doubled inner quotes."""
    inside = cell[1:-1]
    return cell[:1] == cell[-1:] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER) as file:
            names = file.schema_arrow.names
            _check_names(path, names)
            for batch in file.iter_batches(_PARQUET_ROWS):
                for fields in batch.to_pylist():
                    number += 1
                    yield number, fields
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}).") from None
