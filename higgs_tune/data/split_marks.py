"""What both sides of a split must not share: texts, recordings and voices, as hashes on disk.

Table `clips` has each clip's voice, text, recording and kin. Kin names a group: all clips that share a text
or a recording, directly or through others, have the same kin. `taught` has the texts and recordings that
chats teach. `drawn`, `trained` and `held` are sets of hashes that `splits` fills.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sqlite3 import Connection

from higgs_tune.data.audio import find_spelling
from higgs_tune.data.messages import target_content
from higgs_tune.data.plain_text import sound_of
from higgs_tune.data.row_table import RowTable

_SETS = ("drawn", "trained", "held")
_CLIPS = "clips (number INTEGER PRIMARY KEY, voice, text, recording, kin, split)"
# For each kin that shares a recording with a lower kin: the lowest kin with one of its recordings.
_NEARER = """
INSERT INTO nearer SELECT kin, min(lowest) FROM clips JOIN (
    SELECT recording, min(kin) AS lowest FROM clips GROUP BY recording HAVING min(kin) < max(kin)
) USING (recording) WHERE kin > lowest GROUP BY kin
"""


@contextmanager
def split_marks(table: RowTable, root: Path, seed: int) -> Iterator[Connection]:
    """Yield the database with these tables while the block runs; recordings are relative to `root`."""
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
            texts, recordings = target_content(row)
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
    """The hash of a speaker in `clips`."""
    return hashlib.sha256(f"{seed}\0{speaker}".encode()).digest()


def _text_mark(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{sound_of(text)}".encode()).digest()


def _recording_mark(root: Path, name: str, seed: int) -> bytes:
    with suppress(OSError, ValueError):  # unusable path: the row is rejected when its audio is read
        name = os.path.realpath(find_spelling(root, name))
    return hashlib.sha256(f"{seed}\0\0{name}".encode(errors="surrogateescape")).digest()


def _find_kin(database: Connection) -> None:
    """Merge the kin of clips that share a recording; before that, each text has a kin of its own."""
    database.execute("CREATE TABLE nearer (old PRIMARY KEY, new) WITHOUT ROWID")
    while database.execute(_NEARER).rowcount:
        database.execute(
            "UPDATE clips SET kin = (SELECT new FROM nearer WHERE old = kin) "
            "WHERE kin IN (SELECT old FROM nearer)"
        )
        database.execute("DELETE FROM nearer")
    database.execute("DROP TABLE nearer")
