"""Files that appear whole or not at all."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs_tune.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    Raises:
        DataError: the disk is full or the folder cannot be written; the temporary file is removed,
            and what stood at `path` before is untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        # After a success there is nothing left under this name.
        if path.parent.is_dir() and os.access(path.parent, os.W_OK):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _disk_error(path: Path, error: OSError) -> DataError:
    if error.errno in _OUT_OF_SPACE:
        return DataError(
            f"{path}: no space left on the disk ({error.strerror}). Files that were finished "
            "before are kept. Free some space and run the same command again: it goes on from there."
        )
    return DataError(
        f"{path}: cannot be written ({error.strerror or error}). "
        "Give a folder that this user may write."
    )
