"""What must not stand on both sides of a split: texts, recordings and voices, as hashes on the disk.

Table `clips` has a clip's voice, text, recording and kin: the number of all clips that share a text or
a recording with it, directly or through others. `taught` has a chat's texts and recordings. `drawn`,
`trained` and `held` are sets of hashes for the draw.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection

from higgs_tune.data.audio import as_stored
from higgs_tune.data.messages import taught
from higgs_tune.data.plain_text import sound_of
from higgs_tune.data.row_table import RowTable

_SETS = ("drawn", "trained", "held")
_CLIPS = "clips (number INTEGER PRIMARY KEY, voice, text, recording, kin, split)"
# For each kin with a recording that a lower one has, too: the lowest of these.
_NEARER = """
INSERT INTO nearer SELECT kin, min(lowest) FROM clips JOIN (
    SELECT recording, min(kin) AS lowest FROM clips GROUP BY recording HAVING min(kin) < max(kin)
) USING (recording) WHERE kin > lowest GROUP BY kin
"""


@contextmanager
def split_marks(table: RowTable, root: Path, seed: int) -> Iterator[Connection]:
    """The tables, while the block lasts; `root` is what recordings are relative to."""
    database = table.database
    for columns in (_CLIPS, "taught (number, mark)"):
        database.execute(f"CREATE TABLE {columns}")
    for name in _SETS:
        database.execute(f"CREATE TABLE {name} (hash PRIMARY KEY) WITHOUT ROWID")
    for row in table.rows():
        if row.kind == "clip":
            voice, text = voice_mark(row.speaker, seed), _text_mark(row.text, seed)
            values = (row.number, voice, text, _recording_mark(root, row.audio[0], seed), text)
            database.execute("INSERT INTO clips VALUES (?, ?, ?, ?, ?, NULL)", values)
        else:
            texts, recordings = taught(row)
            marks = [_text_mark(text, seed) for text in texts if sound_of(text)]
            marks += [_recording_mark(root, name, seed) for name in recordings]
            database.executemany(
                "INSERT INTO taught VALUES (?, ?)", ((row.number, mark) for mark in marks)
            )
    _find_kin(database)
    yield database
    for name in ("clips", "taught", *_SETS):
        database.execute(f"DROP TABLE {name}")


def voice_mark(speaker: str, seed: int) -> bytes:
    """What stands for a speaker in `clips`."""
    return hashlib.sha256(f"{seed}\0{speaker}".encode()).digest()


def _text_mark(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{sound_of(text)}".encode()).digest()


def _recording_mark(root: Path, name: str, seed: int) -> bytes:
    with suppress(OSError, ValueError):  # no usable path: the row is rejected when it is to be read
        name = os.path.realpath(as_stored(root, name))
    return hashlib.sha256(f"{seed}\0\0{name}".encode()).digest()


def _find_kin(database: Connection) -> None:
    """Give clips of one recording the same kin, and all clips of their texts with them."""
    database.execute("CREATE TABLE nearer (old PRIMARY KEY, new) WITHOUT ROWID")
    while database.execute(_NEARER).rowcount:
        database.execute(
            "UPDATE clips SET kin = (SELECT new FROM nearer WHERE old = kin) "
            "WHERE kin IN (SELECT old FROM nearer)"
        )
        database.execute("DELETE FROM nearer")
    database.execute("DROP TABLE nearer")
