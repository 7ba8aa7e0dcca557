"""The rows of a manifest as a table on disk, because there may be more than fit in memory."""

import json
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, fields
from enum import IntEnum
from functools import partial
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import Any

from higgs_tune.data.rows import ManifestRow, Rejection

_FIELDS = [field.name for field in fields(ManifestRow)]
_AUDIO = _FIELDS.index("audio")
# Columns of `rows`. As normalised paths: `path` is a clip's recording, `wanted` its reference if that has
# no text.
_COLUMNS = [*_FIELDS, "path", "wanted"]
_PARTICULARS = re.compile(r"""(?<!\w)'[^']*'|"[^"]*"|\d+""")  # quoted names, and numbers


class Stage(IntEnum):
    """The stage in which a row was rejected."""

    MANIFEST = 0
    MISSING = 1  # no recording, found before anything is encoded; encoding reports it again
    AUDIO = 2
    SPLIT = 3  # left out of a drawn split: no fault of the row


class RowTable:
    """Rows by number, and separately those that are rejected, in a scratch database.

    Args:
        root: folder that recordings are relative to.
    """

    def __init__(self, database: sqlite3.Connection, root: Path):
        self.database, self._root = database, root
        database.create_function("kind", 1, partial(_PARTICULARS.sub, ""), deterministic=True)
        columns = ", ".join(_COLUMNS).replace("number", "number INTEGER PRIMARY KEY")
        database.execute(f"CREATE TABLE rows ({columns})")
        database.execute(
            "CREATE TABLE rejected (number INTEGER PRIMARY KEY, id, path, reason, stage)"
        )

    def add(self, row: ManifestRow) -> None:
        """Append a row; `complete` adds its reference's text if that is missing."""
        values = list(astuple(row))
        values[_AUDIO] = json.dumps(row.audio)
        clip = [normpath(self._root / name) for name in row.audio if row.kind == "clip"]
        wanted = clip[1] if len(clip) == 2 and row.ref_text is None else None
        marks = ", ".join("?" * len(_COLUMNS))
        self.database.execute(
            f"INSERT INTO rows VALUES ({marks})", [*values, clip[0] if clip else None, wanted]
        )

    def reject(self, rejections: Iterable[Rejection], stage: Stage) -> None:
        """Record rejections; a rejected row stays in the table until `drop_rejected`."""
        self.database.executemany(
            "INSERT INTO rejected VALUES (?, ?, ?, ?, ?)",
            ((r.row, r.id, r.path, r.reason, stage) for r in rejections),
        )

    def forget(self, stage: Stage) -> None:
        """Delete the rejections of one stage."""
        self.database.execute("DELETE FROM rejected WHERE stage = ?", (stage,))

    def drop_rejected(self) -> None:
        """Remove the rows that are rejected."""
        self.database.execute("DELETE FROM rows WHERE number IN (SELECT number FROM rejected)")

    def complete(self) -> None:
        """Give each reference without a text the text of the first clip with its recording."""
        self.database.execute("CREATE INDEX by_path ON rows (path)")
        self.database.execute(
            "UPDATE rows SET ref_text = (SELECT text FROM rows AS other INDEXED BY by_path "
            "WHERE other.path = rows.wanted ORDER BY other.number LIMIT 1) WHERE wanted NOT NULL"
        )
        self.database.execute("DROP INDEX by_path")

    def rows(self) -> Iterator[ManifestRow]:
        """All rows in order."""
        found = self.database.execute(f"SELECT {', '.join(_FIELDS)} FROM rows ORDER BY number")
        return map(_row, found)

    def rows_and_owners(self) -> Iterator[tuple[ManifestRow, int]]:
        """All rows in order, each with the number of the first row that has its id."""
        self.database.execute("CREATE TABLE repeated (id PRIMARY KEY, first)")
        self.database.execute(
            "INSERT INTO repeated SELECT id, min(number) FROM rows GROUP BY id HAVING count(*) > 1"
        )
        found = self.database.execute(
            f"SELECT {', '.join(f'rows.{name}' for name in _FIELDS)}, ifnull(first, number) "
            "FROM rows LEFT JOIN repeated USING (id) ORDER BY number"
        )
        return ((_row(values[:-1]), values[-1]) for values in found)

    def parts(self, size: int) -> Iterator[list[ManifestRow]]:
        """All rows in order, `size` at a time."""
        rows = self.rows()
        while part := list(islice(rows, size)):
            yield part

    def rejected(self) -> Iterator[Rejection]:
        """Rejected rows in order."""
        found = self.database.execute(
            "SELECT number, id, path, reason FROM rejected ORDER BY number"
        )
        return (Rejection(*values) for values in found)

    def first_rejected(self, count: int) -> list[Rejection]:
        """The first rejection of each kind of reason, in order, except rows left out of a split.

        Reasons that differ only in names and numbers are of one kind.
        """
        found = self.database.execute(
            "SELECT min(number), id, path, reason FROM rejected WHERE stage < ? "
            "GROUP BY kind(reason) ORDER BY 1 LIMIT ?",
            (Stage.SPLIT, count),
        )
        return [Rejection(*values) for values in found]

    @property
    def num_rows(self) -> int:
        """Number of rows in the table."""
        return self._count("SELECT count(*) FROM rows")

    def num_rejected(self, last: Stage = Stage.SPLIT) -> int:
        """Number of rows that were rejected in stages up to `last`."""
        return self._count("SELECT count(*) FROM rejected WHERE stage <= ?", last)

    def _count(self, query: str, *values: Any) -> int:
        return self.database.execute(query, values).fetchone()[0]


def _row(values: Sequence[Any]) -> ManifestRow:
    found = list(values)
    found[_AUDIO] = tuple(json.loads(found[_AUDIO]))
    return ManifestRow(*found)
