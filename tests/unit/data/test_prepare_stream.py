"""A streamed manifest gives what the in-memory reference gives; memory does not grow with it."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from higgs_tune.data import encode
from higgs_tune.data.codec import Codec, load_codec
from higgs_tune.data.files import scratch_database
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.shards import ShardFile, list_shards, row_digest
from higgs_tune.errors import DataError
from tests.unit.data import plain_manifest as plain
from tests.unit.data.manifests import read_manifest

ROWS_PER_SHARD = 7


def codes(names: tuple[str, ...]) -> Any:
    """Stand in for a codec: a recording's codes are its number; one recording in nine is unusable."""
    numbers = [int(name.removesuffix(".wav")) for name in names]
    if any(number % 9 == 4 for number in numbers):
        return "cannot be coded"
    return tuple(np.full((1 + number % 3, 8), number, dtype=np.uint16) for number in numbers)


def fake_coder(codec: Any, rules: Any, rows: Iterable[tuple[str, ...]]) -> Iterator[Any]:
    yield from map(codes, rows)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("embedded")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("seed", range(25))
def test_a_prepared_folder_matches_the_plain_reference(
    tmp_path: Path, monkeypatch, codec, seed: int, suffix: str
):
    monkeypatch.setattr(encode, "encode_here", fake_coder)
    monkeypatch.setattr(encode, "load_codec", lambda *_: codec)
    rng = np.random.default_rng(seed)
    fields = plain.random_fields(rng)
    if suffix == ".csv":  # CSV has no null
        fields = [{name: value or "" for name, value in row.items()} for row in fields]
    manifest, out = tmp_path / f"m{suffix}", tmp_path / "out"
    plain.write(manifest, fields)
    for number in range(0, len(fields), 2):
        (tmp_path / f"{number}.wav").write_text("x" * number)
    fraction, draw = float(rng.choice([0, 0.05, 0.1, 0.3])), int(rng.integers(3))
    options = PrepareOptions(
        max_rejected=len(fields),
        val_fraction=fraction,
        seed=draw,
        max_text_chars=plain.MAX_CHARS,
        rows_per_shard=ROWS_PER_SHARD,
    )

    first = 2 if suffix == ".csv" else 1  # the header is CSV's line 1

    def rejection(number: int, reason: str) -> dict[str, Any]:
        raw = fields[number - first]
        ids = raw["id"], f"row{number:06d}" if raw["path"] and raw["split"] != "test" else ""
        return {
            "row": number,
            "id": ids[0] or ids[1],
            "path": raw["path"],
            "reason": reason,
        }

    rows, reasons = plain.read(fields, first)
    refused = [rejection(*item) for item in sorted(reasons.items())]
    content = plain.digest(rows, refused)
    try:
        splits, rule = plain.split(rows, fraction, draw)
    except ValueError as problem:
        with pytest.raises(DataError, match=str(problem)):
            encode.prepare(manifest, out, options=options)
        return
    info = encode.prepare(manifest, out, options=options)

    kept = [row | {"split": s} for row, s in zip(rows, splits, strict=True) if s]
    left_out = "left out: a validation speaker says a text of the train split"
    dropped = {row["number"]: left_out for row, s in zip(rows, splits, strict=True) if s is None}
    unusable = {
        row["number"]: str(codes(tuple(row["audio"])))
        for row in kept
        if isinstance(codes(tuple(row["audio"])), str)
    }
    listed = [rejection(*item) for item in sorted((reasons | dropped | unusable).items())]
    found = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert found == listed
    assert json.loads((out / "prepare.json").read_text())["manifest rows"] == content
    parts = [kept[n : n + ROWS_PER_SHARD] for n in range(0, len(kept), ROWS_PER_SHARD)]
    assert len(list_shards(out)) == len(parts)
    digests = []
    for path, part in zip(list_shards(out), parts, strict=True):
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["fingerprint"] == plain.shard_digest(part, tmp_path)
        assert [r["row"] for r in record["rejected"]] == [
            row["number"] for row in part if row["number"] in unusable
        ]
        coded = [row for row in part if row["number"] not in unusable]
        stored = list(ShardFile(path, 8).rows())
        digests += map(row_digest, stored)
        assert len(stored) == len(coded)
        for one, row in zip(stored, coded, strict=True):
            wanted = {name: row[name] for name in asdict(one) if name != "codes"}
            assert {name: getattr(one, name) for name in wanted} == wanted
            np.testing.assert_equal(one.codes, codes(tuple(row["audio"])))
    assert info.content_hash == sha256(b"".join(sorted(digests))).hexdigest()
    assert (info.num_rows, info.num_rejected, info.split_rule) == (len(digests), len(listed), rule)


def test_duplicate_parquet_columns_are_an_error(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["path", "text", "text"])
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(DataError, match="has several columns named text"):
        read_manifest(tmp_path / "m.parquet", tmp_path, 10)


def test_a_full_disk_for_temporary_files_is_named():
    def fill(num_pages: int, query: str) -> None:
        with scratch_database() as database:
            database.execute(f"PRAGMA max_page_count = {num_pages}")
            database.execute("CREATE TABLE some (number)")
            database.executemany(query, ((n,) for n in range(10**5)))

    with pytest.raises(DataError, match=r"SQLITE_FULL.* Set SQLITE_TMPDIR to a folder with room"):
        fill(20, "INSERT INTO some VALUES (?)")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        fill(20, "INSERT INTO missing VALUES (?)")


_PLAN = """
import json, re, sys
from pathlib import Path
from higgs_tune.data.manifest import open_manifest
from higgs_tune.data.splits import divide

folder = Path(sys.argv[1])
for count in map(int, sys.argv[2:]):
    manifest = folder / f"{count}.jsonl"
    with manifest.open("w") as file:
        for n in range(count):
            row = {"path": f"a/folder/{n}.wav", "text": f"Satz {n} " * 12, "speaker": f"s{n % 99}"}
            if n % 10 == 0:
                row["ref_audio"] = f"a/folder/{count - n - 1}.wav"
            file.write(json.dumps(row) + "\\n")
    with open_manifest(manifest, folder, 2000) as table:
        divide(table, manifest, folder, 0.1, 0)
        found = sum(len(part) for part in table.parts(256))
    assert found == count
    # Not ru_maxrss, which starts at what the parent process had.
    (peak_kib,) = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(int(peak_kib) // 1024)
"""


def test_memory_does_not_grow_with_the_manifest(tmp_path: Path):
    """Keeping all rows in memory would add 40 MiB to the 16 MiB that sorting fills once."""
    counts = [5_000, 50_000]
    words = [sys.executable, "-c", _PLAN, str(tmp_path), *map(str, counts)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    few, many = map(int, done.stdout.split())
    assert many - few < 30, (
        f"MiB of peak memory: {few} for {counts[0]} rows, {many} for {counts[1]}"
    )
