"""Which rows validate: given by the manifest, or drawn so that no text is on both sides.

The draw goes by hashes of texts and speakers, not by places: rows that are added later do not move
the others. It happens on the disk, where the rows are.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from sqlite3 import Connection

from higgs_tune.data.row_table import RowTable, Stage
from higgs_tune.data.rows import Rejection
from higgs_tune.errors import DataError

_MIN_SPEAKERS = 5  # fewer, and a held-out voice would be too large a share of the data
_MAX_LEFT_OUT = 0.02  # share of the rows that a speaker split may leave out
GIVEN = "given by the manifest's split column"


def assign_splits(table: RowTable, val_fraction: float, seed: int) -> str:
    """Give each row its split, reject those that are left out, and return the rule in words.

    Raises:
        DataError: some rows have a split and others none, or there are too few texts to divide.
    """
    database = table.database
    total, named = database.execute("SELECT count(*), count(split) FROM rows").fetchone()
    if named and named < total:
        number, name = database.execute(
            "SELECT number, id FROM rows WHERE split IS NULL ORDER BY number LIMIT 1"
        ).fetchone()
        raise DataError(
            f"row {number} (id {name!r}) has no split, {named} of {total} rows "
            "have one. Fill in the column for all rows or for none."
        )
    if named:
        return GIVEN
    if val_fraction == 0:
        database.execute("UPDATE rows SET split = 'train'")
        return "all rows train"
    with _hashes(table, seed):
        return _draw(table, val_fraction, seed)


def normal_text(text: str) -> str:
    """Texts that differ only in case, spacing or Unicode form count as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shared_texts(table: RowTable) -> int:
    """How many texts are in both splits."""
    with _hashes(table, 0):
        return _number(
            table.database,
            "SELECT count(*) FROM (SELECT text_hash FROM hashes JOIN rows USING (number) "
            "GROUP BY text_hash HAVING min(rows.split) < max(rows.split))",
        )


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


@contextmanager
def _hashes(table: RowTable, seed: int) -> Iterator[None]:
    """Tables for the draw: a hash of each row's text and speaker, and the hashes that are drawn."""
    database = table.database
    database.execute(
        "CREATE TABLE hashes (number INTEGER PRIMARY KEY, text_hash, voice_hash, split)"
    )
    for name in ("drawn", "trained"):
        database.execute(f"CREATE TABLE {name} (hash PRIMARY KEY) WITHOUT ROWID")
    found = database.execute("SELECT number, text, speaker FROM rows ORDER BY number")
    database.executemany(
        "INSERT INTO hashes VALUES (?, ?, ?, NULL)",
        (
            (number, _hash(normal_text(text), seed), _hash(speaker, seed))
            for number, text, speaker in found
        ),
    )
    yield
    for name in ("hashes", "drawn", "trained"):
        database.execute(f"DROP TABLE {name}")


def _draw(table: RowTable, val_fraction: float, seed: int) -> str:
    database = table.database
    num_texts = _number(database, "SELECT count(DISTINCT text_hash) FROM hashes")
    if num_texts < 3:
        raise DataError(
            f"found {num_texts} different texts, needed at least 3 to hold some out for "
            "validation. Add recordings, or a split column, or prepare with --val-fraction 0."
        )
    target = max(2, round(val_fraction * table.num_rows))
    rule = f"drawn with seed {seed} for {val_fraction:g} of the rows"
    if _by_speaker(table, target, seed):
        rule += ": no speaker and no text is shared"
    else:
        _by_text(database, target, num_texts)
        rule += ": no text is shared, speakers are"
    database.execute(
        "UPDATE rows SET split = (SELECT split FROM hashes WHERE hashes.number = rows.number)"
    )
    reason = "left out: a validation speaker says a text of the train split"
    table.reject(
        (
            Rejection(row.number, row.id, row.audio[0], reason)
            for row in table.rows()
            if row.split is None
        ),
        Stage.SPLIT,
    )
    table.drop_rejected()
    return rule


def _brings_nearer(count: int, missing: int) -> bool:
    return count <= 2 * missing  # or it would overshoot by more than is missing now


def _by_text(database: Connection, target: int, num_texts: int) -> None:
    """Whole texts go to validation, about `target` rows; two texts at least, not all."""
    database.execute("DELETE FROM drawn")
    num_drawn = num_rows = 0
    for text_hash, count in database.execute(
        "SELECT text_hash, count(*) FROM hashes GROUP BY text_hash ORDER BY text_hash"
    ):
        if num_drawn + 1 < num_texts and (
            num_drawn < 2 or _brings_nearer(count, target - num_rows)
        ):
            database.execute("INSERT INTO drawn VALUES (?)", (text_hash,))
            num_drawn += 1
            num_rows += count
    database.execute("UPDATE hashes SET split = iif(text_hash IN drawn, 'validation', 'train')")


def _by_speaker(table: RowTable, target: int, seed: int) -> bool:
    """Whole speakers go to validation; False where that is impossible or would leave out too much.

    Rows without a speaker might be anyone's: they make a split by speaker impossible.
    """
    database = table.database
    first, num_speakers = database.execute(
        "SELECT min(speaker), count(DISTINCT speaker) FROM rows"
    ).fetchone()
    if first == "" or num_speakers < _MIN_SPEAKERS:
        return False
    num_rows = 0
    for voice_hash, count in database.execute(
        "SELECT voice_hash, count(*) FROM hashes GROUP BY voice_hash ORDER BY voice_hash"
    ):
        if _brings_nearer(count, target - num_rows):
            database.execute("INSERT INTO drawn VALUES (?)", (voice_hash,))
            num_rows += count
    if not num_rows:
        (speaker,) = database.execute(
            "SELECT speaker FROM rows GROUP BY speaker ORDER BY count(*), speaker LIMIT 1"
        ).fetchone()
        database.execute("INSERT INTO drawn VALUES (?)", (_hash(speaker, seed),))
    database.execute(
        "INSERT INTO trained SELECT DISTINCT text_hash FROM hashes WHERE voice_hash NOT IN drawn "
        "ORDER BY text_hash"
    )
    database.execute(
        "UPDATE hashes SET split = CASE WHEN voice_hash NOT IN drawn THEN 'train' "
        "WHEN text_hash NOT IN trained THEN 'validation' END"
    )
    num_held = _number(
        database, "SELECT count(DISTINCT text_hash) FROM hashes WHERE split = 'validation'"
    )
    num_left_out = _number(database, "SELECT count(*) FROM hashes WHERE split IS NULL")
    return num_held >= 2 and num_left_out <= _MAX_LEFT_OUT * table.num_rows


def _number(database: Connection, query: str) -> int:
    return database.execute(query).fetchone()[0]
