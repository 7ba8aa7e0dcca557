"""The Parquet dataset on disk: rows, shards, `dataset.json`.

Codes are stored without BOS/EOS and without delay. Shapes: T frames, C codebooks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from higgs_tune.data.files import scratch_database, writing
from higgs_tune.errors import DataError
from higgs_tune.files import replace_file, write_json

FORMAT = 1
INFO_NAME = "dataset.json"
SHARD_FOLDER = "shards"
SPLITS = ("train", "validation")
# One read decodes one row group: small enough for random access, large enough to compress.
ROWS_PER_GROUP = 64

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("speaker", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("ref_text", pa.string()),
        pa.field("turns", pa.string()),
        pa.field("start_index", pa.int32(), nullable=False),
        pa.field("codes", pa.list_(pa.list_(pa.uint16())), nullable=False),
        pa.field("num_frames", pa.list_(pa.int32()), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a dataset.

    A clip has `codes[0]` = the speech of `text`, and `codes[1]` = reference speech when `ref_text`
    is set. A chat has `turns`, JSON [{"role", "parts": [{"type": "text", "text"} | {"type":
    "audio", "audio": k}]}]; its assistant turns from `start_index` on are targets.
    """

    id: str
    split: Literal["train", "validation"]
    kind: Literal["clip", "chat"]
    speaker: str
    text: str
    codes: tuple[np.ndarray, ...]  # each (T, C) uint16
    language: str | None = None
    ref_text: str | None = None
    turns: str | None = None
    start_index: int = 0

    @property
    def num_frames(self) -> tuple[int, ...]:
        """Frames of each audio."""
        return tuple(len(codes_TC) for codes_TC in self.codes)


@dataclass(frozen=True)
class CodecFacts:
    """Facts about a dataset's codec, checked against the codec that decodes it and the base it trains."""

    id: str
    sample_rate_hz: int
    frame_rate_hz: float
    num_codebooks: int
    codebook_size: int  # codes only; BOS and EOS are not counted
    revision: str | None = None  # commit of a Hub id
    weights_sha256: str | None = None  # None in datasets made before it was recorded


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`, whose presence means that the dataset is complete."""

    codec: CodecFacts
    num_rows: int
    hours: float
    num_rejected: int
    splits: dict[str, int]
    content_hash: str
    split_rule: str
    format: int = FORMAT


def write_shard(path: Path, rows: Sequence[Row], codec: CodecFacts) -> None:
    """Write `rows` as one Parquet file, atomically. Equal rows give equal bytes."""
    for row in rows:
        _assert_storable(row, codec)
    columns = {
        "codes": [[codes_TC.astype(np.uint16).ravel() for codes_TC in row.codes] for row in rows],
        "num_frames": [row.num_frames for row in rows],
    }
    names = [name for name in SCHEMA.names if name not in columns]
    columns |= {name: [getattr(row, name) for row in rows] for name in names}
    table = pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)

    def write(draft: Path) -> None:
        pq.write_table(table, draft, compression="zstd", row_group_size=ROWS_PER_GROUP)

    with writing(path):
        replace_file(path, write)


def _assert_storable(row: Row, codec: CodecFacts) -> None:
    assert row.split in SPLITS, row.split
    assert (row.kind == "chat") == (row.turns is not None), row.id
    if row.kind == "clip":
        assert len(row.codes) == (1 if row.ref_text is None else 2), row.id
    for codes_TC in row.codes:
        assert codes_TC.shape == (len(codes_TC), codec.num_codebooks), row.id
        assert len(codes_TC) > 0, row.id
        assert int(codes_TC.max()) < codec.codebook_size, row.id


def shard_path(directory: Path, index: int) -> Path:
    """Path of shard `index` of the dataset in `directory`."""
    return directory / SHARD_FOLDER / f"part-{index:05d}.parquet"


def list_shards(directory: Path) -> list[Path]:
    """The dataset's shards in order."""
    return sorted((directory / SHARD_FOLDER).glob("part-*.parquet"))


class ShardFile:
    """Random access to the rows of one memory-mapped shard."""

    def __init__(self, path: Path, num_codebooks: int):
        self._num_codebooks = num_codebooks
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet ({error}). Delete the dataset folder and run "
                "`higgs-tune data prepare` again."
            ) from None
        if not self._file.schema_arrow.equals(SCHEMA):
            raise DataError(
                f"{path}: found columns {self._file.schema_arrow.names}, needed {SCHEMA.names} "
                f"of dataset format {FORMAT}. Prepare the dataset again with this version."
            )
        meta = self._file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.group_starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def values(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of some columns, row by row."""
        columns = self._file.read(columns=list(names))
        return zip(*(columns.column(name).to_pylist() for name in names), strict=True)

    def group(self, index: int) -> list[Row]:
        """The rows of one row group; their codes are views of one buffer."""
        table = self._file.read_row_group(index).combine_chunks()
        codes = table.column("codes").combine_chunks()
        parts = (codes.offsets, codes.values.offsets, codes.values.values)
        # to_numpy would import pandas, which takes 0.4 s of a sweep's start
        outer, inner, flat = (np.from_dlpack(part) for part in parts)
        plain = table.drop_columns(["codes", "num_frames"]).to_pylist()
        rows = []
        for number, fields in enumerate(plain):
            audios = range(outer[number], outer[number + 1])
            views = (flat[inner[k] : inner[k + 1]] for k in audios)
            rows.append(
                Row(codes=tuple(v.reshape(-1, self._num_codebooks) for v in views), **fields)
            )
        return rows

    def rows(self) -> Iterator[Row]:
        """All rows in order."""
        for index in range(len(self.group_starts) - 1):
            yield from self.group(index)


def content_hash(digests: Iterable[bytes]) -> str:
    """Fingerprint of a dataset from its rows' digests, independent of their order and shards."""
    found = hashlib.sha256()
    with scratch_database() as database:  # sorts more digests than fit in memory
        database.execute("CREATE TABLE digests (digest)")
        database.executemany("INSERT INTO digests VALUES (?)", ((digest,) for digest in digests))
        for (digest,) in database.execute("SELECT digest FROM digests ORDER BY digest"):
            found.update(digest)
    return found.hexdigest()


def row_digest(row: Row) -> bytes:
    """SHA-256 of everything a row holds."""
    plain = {name: getattr(row, name) for name in SCHEMA.names if name != "codes"}
    digest = hashlib.sha256(json.dumps(plain, ensure_ascii=True, sort_keys=True).encode())
    for codes_TC in row.codes:
        digest.update(np.ascontiguousarray(codes_TC, dtype="<u2").tobytes())
    return digest.digest()


def finish_dataset(
    directory: Path, codec: CodecFacts, *, num_rejected: int, split_rule: str
) -> DatasetInfo:
    """Count and fingerprint the shards in `directory` and write its `dataset.json`."""
    splits: Counter[str] = Counter()
    num_frames = 0

    def digests() -> Iterator[bytes]:
        nonlocal num_frames
        for path in list_shards(directory):
            for row in ShardFile(path, codec.num_codebooks).rows():
                splits[row.split] += 1
                num_frames += sum(row.num_frames)
                yield row_digest(row)

    fingerprint = content_hash(digests())
    info = DatasetInfo(
        codec=codec,
        num_rows=splits.total(),
        hours=round(num_frames / codec.frame_rate_hz / 3600, 6),
        num_rejected=num_rejected,
        splits={name: splits[name] for name in SPLITS},
        content_hash=fingerprint,
        split_rule=split_rule,
    )
    with writing(directory / INFO_NAME):
        write_json(directory / INFO_NAME, {"format": info.format, **asdict(info)})
    return info


def write_dataset(
    directory: Path,
    rows: Sequence[Row],
    codec: CodecFacts,
    *,
    split_rule: str = "given by the caller",
    rows_per_shard: int = 1024,
) -> DatasetInfo:
    """Write a whole dataset from rows in memory, replacing one that is in `directory`."""
    for stale in (directory / INFO_NAME, *list_shards(directory)):
        stale.unlink(missing_ok=True)
    for index, start in enumerate(range(0, len(rows), rows_per_shard)):
        write_shard(shard_path(directory, index), rows[start : start + rows_per_shard], codec)
    return finish_dataset(directory, codec, num_rejected=0, split_rule=split_rule)


def read_info(directory: Path) -> DatasetInfo:
    """Read and check `dataset.json`.

    Raises:
        DataError: no dataset, an unfinished one, another format, or wrong fields.
    """
    path = directory / INFO_NAME
    if not path.is_file():
        if list_shards(directory):
            state, advice = "its preparation was not finished", "Run"
        else:
            state = f"there is no dataset in {directory.absolute()}"
            advice = "Give the folder of one (data.path, --data), or run"
        raise DataError(
            f"{directory}: found no {INFO_NAME}, {state}. "
            f"{advice} `higgs-tune data prepare MANIFEST --out` with this folder."
        )
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Prepare it again.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise DataError(
            f"{path}: found dataset format {found!r}, needed {FORMAT}. "
            "Prepare the dataset again with this version."
        )
    try:
        codec = CodecFacts(**raw.pop("codec"))
        info = DatasetInfo(codec=codec, **raw)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: fields are missing or unknown ({error}). Prepare it again."
        ) from None
    for name in ("sample_rate_hz", "frame_rate_hz", "num_codebooks", "codebook_size"):
        value = getattr(codec, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise DataError(f"{path}: codec.{name} is {value!r}, needed a positive number.")
    return info
