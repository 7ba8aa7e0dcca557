"""The files of a dataset; one that cannot be written is a DataError that says how to go on."""

import errno
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from higgs_tune import files
from higgs_tune.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place.

    Raises:
        DataError: the disk is full or the folder cannot be written; what stood there is untouched.
    """
    try:
        files.replace_file(path, write)
    except OSError as error:
        raise _disk_error(path, error) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, with the errors of `write_file`."""
    try:
        files.write_json(path, content)
    except OSError as error:
        raise _disk_error(path, error) from error


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, with the errors of `write_file`."""
    try:
        files.write_json_lines(path, lines)
    except OSError as error:
        raise _disk_error(path, error) from error


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
