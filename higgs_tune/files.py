"""Files and folders that appear whole or not at all: written under another name, then renamed."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from higgs_tune.errors import DataError, reason_of

RESUME_FILES = ("training_state.*", "checkpoint.json")  # beside an adapter, but not part of it


@contextmanager
def writing(place: Path, advice: str) -> Iterator[None]:
    """Name the place and the next step when a write in this block fails, also one by safetensors.

    Raises:
        DataError: the disk is full, or a file or folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else error
        raise DataError(f"{place}: cannot be written: {reason}. {advice}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    Raises:
        OSError: writing failed; the temporary file is removed, and an existing file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        with draft.open("rb+") as handle:
            os.fsync(handle.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content."""
    replace_file(path, lambda draft: draft.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file's content by indented JSON; NaN is an error, because JSON has none."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file's content by one JSON object per line."""

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    replace_file(path, write)


def json_line(content: Mapping[str, Any]) -> str:
    """One line of JSON; numbers that are not finite become null, because JSON has none."""
    return json.dumps(_with_null(content), ensure_ascii=False, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_null(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append `json_line(content)`, and wait until it is on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_line(content) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, without a last one that was cut off; none if there is no file.

    Raises:
        DataError: a line is not JSON.
    """
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error}. Fix the line, or delete it."
            ) from None
    return lines


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty neighbour of `folder`, then swap the two. One writer at a time.

    Between the two renames only `former(folder)` is whole, so readers look there, too. The new folder
    is on the disk before the old one goes, so a power cut leaves one of the two whole.
    """
    draft = folder.with_name(f".{folder.name}.new")
    for leftover in (draft, former(folder)):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write(draft)
        for path, _, names in os.walk(draft):
            for name in (*names, ""):  # its files, then the folder's own entries
                _sync(Path(path, name))
    except BaseException:  # re-raised; a full disk needs the draft's space, also after Ctrl-C
        shutil.rmtree(draft)
        raise
    if folder.exists():
        folder.rename(former(folder))
    draft.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(former(folder), ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of entries, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or path.is_file():
            raise  # otherwise a network file system that cannot sync folders
    finally:
        os.close(handle)


def share_weights(folder: Path) -> None:
    """Give a folder's weights the same permissions as its JSON files.

    safetensors writes files that only their owner can read.
    """
    for path in folder.glob("*.safetensors"):
        mode = next(p for p in folder.iterdir() if p.suffix == ".json").stat().st_mode
        path.chmod(mode)


def former(folder: Path) -> Path:
    """Where `replace_folder` puts the old folder during the swap."""
    return folder.with_name(f".{folder.name}.old")
