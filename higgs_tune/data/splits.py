"""Choose the rows that validate: as the manifest says, or drawn so that no text or recording is shared.

Clips validate, chats do not. The draw goes by hashes of texts and speakers, not by position, so that rows
that are added later seldom move others. It runs in the database on disk, where the rows are.
"""

import json
import logging
from pathlib import Path
from sqlite3 import Connection

from higgs_tune.data.row_table import RowTable, Stage
from higgs_tune.data.rows import Rejection
from higgs_tune.data.split_marks import split_marks, voice_mark
from higgs_tune.errors import DataError

_MIN_SPEAKERS = 5  # with fewer, a held-out voice would be too large a share of the data
_MAX_LEFT_OUT = 0.02  # share of the clips that a speaker split may leave out
_MAX_CHATS_LEFT_OUT = 0.25  # and of the chats: a held-out voice may have nearly all of them
_HELD_SPEAKERS = "SELECT speaker FROM rows WHERE split = 'validation'"

logger = logging.getLogger(__name__)


def divide(table: RowTable, manifest: Path, root: Path, val_fraction: float, seed: int) -> str:
    """Give each row its split, reject the rows that are left out, and return the rule in words.

    Warns of repeated clips, of a given split whose sides share texts or recordings, and of a split that
    cannot validate.

    Args:
        root: folder that recordings are relative to.

    Raises:
        DataError: some rows have a split and others none, or there are too few texts to split.
    """
    total, named = table.database.execute("SELECT count(*), count(split) FROM rows").fetchone()
    if named and named < total:
        number, name = table.database.execute(
            "SELECT number, id FROM rows WHERE split IS NULL ORDER BY number LIMIT 1"
        ).fetchone()
        raise DataError(
            f"{manifest}: row {number} (id {name!r}) has no split, {named} of {total} rows "
            "have one. Fill in the column for all rows or for none."
        )
    _warn_of_repeated(table.database, manifest)
    if not named and val_fraction == 0:
        table.database.execute("UPDATE rows SET split = 'train'")
        return "all rows train"
    with split_marks(table, root, seed) as database:
        if named:
            rule = "given by the manifest's split column"
            _warn_of_shared(database, manifest)
        else:
            rule = _draw(table, manifest, val_fraction, seed)
        _warn_unless_two_texts(database, manifest)
    return rule


def _warn_of_repeated(database: Connection, manifest: Path) -> None:
    """Warn of clips that repeat the recording and the text of an earlier row."""
    count, first = database.execute(
        "SELECT count(*), min(number) FROM (SELECT number, row_number() OVER "
        "(PARTITION BY path, text ORDER BY number) AS place FROM rows WHERE kind = 'clip') "
        "WHERE place > 1"
    ).fetchone()
    if count:
        logger.warning(
            "%s: %d rows (the first is row %d) repeat the recording and the text of an earlier row: "
            "such clips weigh more than others",
            manifest,
            count,
            first,
        )


def _warn_of_shared(database: Connection, manifest: Path) -> None:
    """Warn of validation texts and recordings that are also trained."""
    database.execute(
        "INSERT OR IGNORE INTO trained "
        "SELECT clips.text FROM clips JOIN rows USING (number) WHERE rows.split = 'train' UNION "
        "SELECT recording FROM clips JOIN rows USING (number) WHERE rows.split = 'train' UNION "
        "SELECT mark FROM taught JOIN rows USING (number) WHERE rows.split = 'train'"
    )
    shared = []
    for name in ("text", "recording"):
        count = _number(
            database,
            f"SELECT count(DISTINCT clips.{name}) FROM clips JOIN rows USING (number) "
            f"WHERE rows.split = 'validation' AND clips.{name} IN trained",
        )
        if count:
            shared.append(f"{count} {name}s")
    if shared:
        logger.warning(
            "%s: %s are in both splits, as its split column says", manifest, " and ".join(shared)
        )


def _warn_unless_two_texts(database: Connection, manifest: Path) -> None:
    num_texts = _number(
        database,
        "SELECT count(DISTINCT clips.text) FROM clips JOIN rows USING (number) "
        "WHERE rows.split = 'validation'",
    )
    if num_texts < 2:
        logger.warning(
            "%s: found %d different texts of clips for validation, needed 2: no sweep or training "
            "can validate on this dataset. Chats do not validate: if they only wrap a recording and "
            "its text, add --clips-from-chat; or add clips.",
            manifest,
            num_texts,
        )


def _draw(table: RowTable, manifest: Path, val_fraction: float, seed: int) -> str:
    database = table.database
    num_clips, num_kin = database.execute(
        "SELECT count(*), count(DISTINCT kin) FROM clips"
    ).fetchone()
    if not num_clips:
        database.execute("UPDATE rows SET split = 'train'")
        return "all rows train: chats do not validate"
    if num_kin < 3:
        raise DataError(
            f"{manifest}: found {num_kin} different texts of clips, needed at least 3 to hold some "
            "out for validation (texts of one recording count as one). Add recordings, or "
            "--clips-from-chat, or a split column, or prepare with --val-fraction 0."
        )
    target = max(2, round(val_fraction * num_clips))
    rule = f"drawn with seed {seed} for {val_fraction:g} of the clips"
    by_speaker = _by_speaker(database, target, seed)
    if by_speaker:
        rule += ": no speaker and no text is shared"
    else:
        _by_text(database, target, num_kin)
        rule += ": no text is shared, speakers are"
    database.execute(
        "UPDATE rows SET split = CASE kind WHEN 'chat' THEN 'train' "
        "ELSE (SELECT split FROM clips WHERE clips.number = rows.number) END"
    )
    chats = "SELECT count(*) FROM rows WHERE kind = 'chat'"
    num_chats = _number(database, chats)
    _leave_out(table, by_speaker)
    if num_left_out := num_chats - _number(database, chats):
        logger.warning(
            "%s: %d of %d chats are left out: they are of validation speakers, or teach a text or "
            "recording of a validation clip",
            manifest,
            num_left_out,
            num_chats,
        )
    return rule


def _leave_out(table: RowTable, by_speaker: bool) -> None:
    """Reject the rows that would put a text, a recording or a speaker on both sides."""
    table.database.execute(
        "INSERT OR IGNORE INTO held SELECT text FROM clips WHERE split = 'validation' UNION "
        "SELECT recording FROM clips WHERE split = 'validation'"
    )
    conditions = {
        "split IS NULL": "a validation speaker says a text of the train split",
        "number IN (SELECT number FROM taught WHERE mark IN held)": "a chat that teaches a text "
        "or recording of a validation clip",
    }
    if by_speaker:
        conditions[f"kind = 'chat' AND speaker IN ({_HELD_SPEAKERS})"] = (
            "a chat of a validation speaker"
        )
    for condition, reason in conditions.items():
        found = table.database.execute(f"SELECT number, id, audio FROM rows WHERE {condition}")
        table.reject(
            (
                Rejection(number, name, json.loads(audio)[0], f"left out: {reason}")
                for number, name, audio in found
            ),
            Stage.SPLIT,
        )
        table.drop_rejected()


def _brings_nearer(count: int, missing: int) -> bool:
    return count <= 2 * missing  # more would overshoot by more than is missing now


def _by_text(database: Connection, target: int, num_kin: int) -> None:
    """Move whole groups of kin to validation: about `target` clips, at least two groups, not all."""
    database.execute("DELETE FROM drawn")
    num_drawn = num_rows = 0
    for kin, count in database.execute("SELECT kin, count(*) FROM clips GROUP BY kin ORDER BY kin"):
        if num_drawn + 1 < num_kin and (num_drawn < 2 or _brings_nearer(count, target - num_rows)):
            database.execute("INSERT INTO drawn VALUES (?)", (kin,))
            num_drawn += 1
            num_rows += count
    database.execute("UPDATE clips SET split = iif(kin IN drawn, 'validation', 'train')")


def _by_speaker(database: Connection, target: int, seed: int) -> bool:
    """Move whole speakers to validation; False if that is impossible or would leave out too much.

    A row without a speaker may be anyone's, so a single one makes a split by speaker impossible.
    """
    unknown = _number(database, "SELECT count(*) FROM rows WHERE speaker = ''")
    num_clips, num_speakers = database.execute(
        "SELECT count(*), count(DISTINCT voice) FROM clips"
    ).fetchone()
    if unknown or num_speakers < _MIN_SPEAKERS:
        return False
    num_rows = 0
    for voice, count in database.execute(
        "SELECT voice, count(*) FROM clips GROUP BY voice ORDER BY voice"
    ):
        if _brings_nearer(count, target - num_rows):
            database.execute("INSERT INTO drawn VALUES (?)", (voice,))
            num_rows += count
    if not num_rows:
        (speaker,) = database.execute(
            "SELECT speaker FROM rows WHERE kind = 'clip' "
            "GROUP BY speaker ORDER BY count(*), speaker LIMIT 1"
        ).fetchone()
        database.execute("INSERT INTO drawn VALUES (?)", (voice_mark(speaker, seed),))
    database.execute(
        "INSERT INTO trained SELECT DISTINCT kin FROM clips WHERE voice NOT IN drawn ORDER BY kin"
    )
    database.execute(
        "UPDATE clips SET split = CASE WHEN voice NOT IN drawn THEN 'train' "
        "WHEN kin NOT IN trained THEN 'validation' END"
    )
    num_held = _number(database, "SELECT count(DISTINCT kin) FROM clips WHERE split = 'validation'")
    num_left_out = _number(database, "SELECT count(*) FROM clips WHERE split IS NULL")
    few_clips = num_left_out <= _MAX_LEFT_OUT * num_clips
    return num_held >= 2 and few_clips and _holds_few_chats(database, seed)


def _holds_few_chats(database: Connection, seed: int) -> bool:
    """Whether the drawn speakers have no more chats than may be left out."""
    drawn = {voice for (voice,) in database.execute("SELECT hash FROM drawn")}
    num_chats = num_held = 0
    for speaker, count in database.execute(
        "SELECT speaker, count(*) FROM rows WHERE kind = 'chat' GROUP BY speaker"
    ):
        num_chats += count
        num_held += count if voice_mark(speaker, seed) in drawn else 0
    return num_held <= _MAX_CHATS_LEFT_OUT * num_chats


def _number(database: Connection, query: str) -> int:
    return database.execute(query).fetchone()[0]
