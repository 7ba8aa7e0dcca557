"""Read a manifest, the user's list of recordings, into checked rows.

The file is read once and its rows are kept on disk. A row that cannot be used is rejected with a reason;
a file that cannot be read as its extension says is an error. No audio is read here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import normpath
from pathlib import Path
from typing import Any

from higgs_tune.data.audio import find_spelling
from higgs_tune.data.files import scratch_database
from higgs_tune.data.manifest_files import encoding_of, read_fields
from higgs_tune.data.messages import chat_row, clip_from_chat, repeated_target
from higgs_tune.data.plain_text import visible
from higgs_tune.data.row_table import RowTable, Stage
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
    is_blank,
    refuse_segment,
    same_form,
    text_field,
    text_problem,
)
from higgs_tune.data.tasks import texts_of
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


@contextmanager
def open_manifest(
    path: Path, data_root: Path, max_text_chars: int, clips_from_chat: bool = False
) -> Iterator[RowTable]:
    """Read ChatML JSONL, `metadata.json`, CSV, TSV or Parquet, as the file's extension says.

    Args:
        data_root: folder that transcript files are relative to.
        max_text_chars: longest text of one part.
        clips_from_chat: turn chats that only wrap a recording and its text into clips.

    Yields:
        The checked rows and the rejected ones, kept on disk until the block ends.

    Raises:
        DataError: no such file, an unknown extension or encoding, or no rows; or the disk for temporary
            files is full, also while the block runs.
    """
    with scratch_database() as database:
        table = RowTable(database, data_root)
        for number, fields in read_fields(path):
            try:
                if isinstance(fields, DataError):
                    raise fields
                row = _row(number, fields, data_root)
                table.add(clip_from_chat(row) if clips_from_chat and row.kind == "chat" else row)
            except DataError as problem:
                table.reject([_rejection(number, fields, str(problem))], Stage.MANIFEST)
        if not table.num_rows and not table.num_rejected():
            raise DataError(
                f"{path}: found no rows. A manifest needs at least one recording with text."
            )
        table.complete()
        table.reject(_rejections(table, data_root, max_text_chars), Stage.MANIFEST)
        table.drop_rejected()
        yield table


def _rejections(table: RowTable, data_root: Path, max_text_chars: int) -> Iterator[Rejection]:
    """Yield a rejection for each row that is well-formed but cannot be used."""
    for row, owner in table.rows_and_owners():
        if row.number != owner:
            problem = f"id {row.id!r} is already used by row {owner}; ids must be unique"
        else:
            problem = _rejection_reason(row, data_root, max_text_chars)
        if problem:
            yield Rejection(row.number, row.id, row.audio[0], problem)


def _rejection_reason(row: ManifestRow, data_root: Path, max_text_chars: int) -> str | None:
    if row.kind == "clip" and len(row.audio) == 2 and row.ref_text is None:
        return (
            "has a reference recording without its text: add ref_transcript, or a separate row "
            "for that recording"
        )
    if row.kind == "clip" and len({normpath(data_root / name) for name in row.audio}) < len(
        row.audio
    ):
        return (
            "has its own recording as its reference, which teaches copying: name another recording of "
            "this speaker, or none to have one drawn"
        )
    if (copied := repeated_target(row, data_root)) is not None:
        return (
            f"trains on {copied}, which appears earlier in the same chat and so teaches copying: name "
            "another recording there"
        )
    texts = texts_of(row.text, row.turns, row.ref_text)
    if row.kind == "chat":  # its messages are not empty: a blank text is a scene's line break
        texts = [text for text in texts if not is_blank(text)]
    return next(filter(None, (text_problem(text, max_text_chars) for text in texts)), None)


def _row(number: int, fields: Any, data_root: Path) -> ManifestRow:
    """Build a row from its fields, whatever the format of the manifest."""
    if not isinstance(fields, Mapping):
        raise DataError(f"found {type(fields).__name__}, needed an object with fields")
    identity = {
        "number": number,
        "id": field(fields, ID) or f"row{number:06d}",
        "split": _split(field(fields, SPLIT)),
        "speaker": " ".join(visible(text_field(fields, SPEAKER) or "").split()),
        "language": field(fields, LANGUAGE),
    }
    if fields.get("messages") is not None:
        return chat_row(fields, identity)
    refuse_segment(fields)
    path = audio_path(fields, PATH)
    if path is None:
        raise DataError(f"has no audio: needed one of the fields {', '.join(PATH)}, or messages")
    text = _text(fields, TEXT, TEXT_FILE, data_root)
    if text is None and field(fields, TEXT, keep_empty=True) is None:
        raise DataError(f"has no text: needed one of the fields {', '.join(TEXT + TEXT_FILE)}")
    reference = audio_path(fields, REF_AUDIO)
    return ManifestRow(
        **identity,
        kind="clip",
        text=text or "",
        audio=(path,) if reference is None else (path, reference),
        ref_text=(reference and _text(fields, REF_TEXT, REF_TEXT_FILE, data_root)) or None,
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
    """The text, from the first field that has one, or from the file that a field names."""
    text = text_field(fields, names)
    if text is not None:
        return text
    name = audio_path(fields, file_names)
    if name is None:
        return None
    try:
        path = find_spelling(data_root, name)
        if not path.resolve().is_relative_to(data_root.resolve()):
            raise DataError(f"transcript file {name} is outside the data root")
        return same_form(path.read_text(encoding_of(path)))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"transcript file {name} cannot be read ({reason})") from None


def _rejection(number: int, fields: Any, reason: str) -> Rejection:
    def plain(names: tuple[str, ...]) -> str | None:
        found = (fields.get(name) for name in names) if isinstance(fields, Mapping) else iter(())
        value = next((value for value in found if isinstance(value, str)), None)
        return value and value.encode("utf-8", "replace").decode("utf-8")

    return Rejection(number, plain(ID), plain(PATH), reason)
