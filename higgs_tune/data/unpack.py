"""Write the recordings that Parquet files hold, as those of Hugging Face datasets do, and a manifest."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from higgs_tune.data.files import writing
from higgs_tune.data.progress import progress
from higgs_tune.data.rows import PATH
from higgs_tune.errors import DataError
from higgs_tune.files import replace_file

MANIFEST = "manifest.parquet"
RECORDINGS = "recordings"
_ROWS = 64  # decoded at a time: a recording may have megabytes
_BUFFER = 2**20  # bytes of a column read at a time: a row group may hold thousands of recordings
_SUFFIX = re.compile(r"\.\w{1,8}")


@dataclass(frozen=True)
class Unpacked:
    """What `unpack` has written."""

    manifest: Path
    num_rows: int
    num_recordings: int


def unpack(sources: Sequence[Path], out: Path) -> Unpacked:
    """Write the recordings that Parquet files hold, and one manifest of all their rows.

    Each column of structs with `bytes` becomes one of paths relative to `out`, named by row and column. All
    other columns stay, but one that `data prepare` would take for the recording's path is renamed, as
    `path` of Common Voice. Recordings that an interrupted run has written are kept; the manifest comes last.

    Raises:
        DataError: a file cannot be read as Parquet, holds no recordings, or has other columns than the
            first; or the disk is full or `out` cannot be written.
    """
    first = _schema(sources[0])
    audio = [field.name for field in first if _holds_bytes(field.type)]
    if not audio:
        raise DataError(
            f"{sources[0]}: no column holds recordings, needed a struct with `bytes`; found "
            f"{', '.join(first.names)}. If a column has paths, give the file to `higgs-tune data prepare`."
        )
    for source in sources[1:]:
        if not _schema(source).equals(first):
            raise DataError(
                f"{source}: its columns differ from those of {sources[0]}. Unpack it on its own."
            )
    schema = pa.schema(
        [
            pa.field(f.name, pa.string())
            if f.name in audio
            else f.with_name(f"original_{f.name}")
            if f.name in PATH
            else f
            for f in first
        ]
    )
    counted = {"rows": 0, "recordings": 0}

    def write(draft: Path) -> None:
        with (
            pq.ParquetWriter(draft, schema) as writer,
            progress("rows", sum(_num_rows(source) for source in sources)) as advance,
        ):
            for batch in _batches(sources):
                columns = {name: batch.column(name) for name in first.names}
                for name in audio:
                    values = columns[name].to_pylist()
                    places = [
                        _write_recording(out, counted["rows"] + index, name, value)
                        for index, value in enumerate(values)
                    ]
                    columns[name] = pa.array(places, pa.string())
                    counted["recordings"] += sum(bool((v or {}).get("bytes")) for v in values)
                writer.write_batch(pa.record_batch(list(columns.values()), schema=schema))
                counted["rows"] += batch.num_rows
                advance(batch.num_rows)

    with writing(out / MANIFEST):
        replace_file(out / MANIFEST, write)
    return Unpacked(out / MANIFEST, counted["rows"], counted["recordings"])


def _holds_bytes(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or (index := kind.get_field_index("bytes")) < 0:
        return False
    held = kind.field(index).type
    return pa.types.is_binary(held) or pa.types.is_large_binary(held)


def _schema(source: Path) -> pa.Schema:
    try:
        return pq.read_schema(source).remove_metadata()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(source, error) from None


def _num_rows(source: Path) -> int:
    return pq.read_metadata(source).num_rows


def _batches(sources: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for source in sources:
        try:
            with pq.ParquetFile(source, buffer_size=_BUFFER) as file:
                yield from file.iter_batches(_ROWS)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(source, error) from None


def _unreadable(source: Path, error: Exception) -> DataError:
    return DataError(f"{source}: cannot be read as Parquet ({error}). Give a .parquet file.")


def _write_recording(out: Path, row: int, column: str, value: dict[str, Any] | None) -> str | None:
    """Write a recording, unless the file has these bytes already; returns its path from `out`.

    A value without bytes keeps its path, if it has one.
    """
    content, path = (value or {}).get("bytes"), (value or {}).get("path")
    if not content:
        return path
    suffix = Path(path or "").suffix
    name = f"{row:07d}-{column}{suffix if _SUFFIX.fullmatch(suffix) else ''}"
    place = out / RECORDINGS / name
    if not place.exists() or place.read_bytes() != content:
        place.parent.mkdir(exist_ok=True)
        draft = place.with_name(f".{name}.tmp")
        draft.write_bytes(content)
        draft.replace(place)
    return f"{RECORDINGS}/{name}"
