"""The files of a dataset; one that cannot be written is a DataError that says how to go on."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from higgs_tune.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
_SCRATCH_KIB = 8 * 1024  # of a scratch database that are kept in memory
_SCRATCH_ERRORS = {
    "SQLITE_FULL",
    "SQLITE_CANTOPEN",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_GETTEMPPATH",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say how to go on where a file cannot be written.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise DataError(
                f"{path}: no space left on the disk ({error.strerror}). Files that were finished "
                "before are kept. Free some space and run the same command again: it goes on from there."
            ) from error
        if isinstance(error, FileExistsError):
            raise DataError(
                f"{path.parent}: is a file, needed a folder. Give another one."
            ) from error
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Give a folder that this user may write."
        ) from error


@contextmanager
def scratch_database() -> Iterator[sqlite3.Connection]:
    """An empty SQLite database that goes with the block; all but a little of it is on the disk.

    Its file has no name, so not even a process that is killed leaves anything behind.

    Raises:
        DataError: the disk is full, or the folder of temporary files cannot be written.
    """
    with closing(sqlite3.connect("")) as database:
        database.execute(f"PRAGMA cache_size = -{_SCRATCH_KIB}")
        database.execute("PRAGMA temp_store = FILE")  # of sorting and grouping
        database.execute("PRAGMA journal_mode = OFF")  # nothing is ever rolled back
        try:
            yield database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in _SCRATCH_ERRORS:
                raise
            raise DataError(
                f"temporary files: {error} ({error.sqlite_errorname}). Rows of a manifest wait on "
                "the disk, about as many bytes as it has. Set SQLITE_TMPDIR to a folder with room."
            ) from error
