"""Write a dataset's files; a failed write becomes a DataError that says what to do."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from higgs_tune.errors import DataError

_OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT}
_SCRATCH_KIB = 8 * 1024  # of a scratch database that may stay in memory
_SCRATCH_ERRORS = {
    "SQLITE_FULL",
    "SQLITE_CANTOPEN",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_GETTEMPPATH",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write in this block into a DataError that says what to do.

    Raises:
        DataError: the disk is full or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_SPACE:
            raise DataError(
                f"{path}: no space left on the disk ({error.strerror}). Files that were finished "
                "before are kept. Free some space and run the same command again: it continues from there."
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
    """Yield an empty SQLite database, nearly all of it on disk, that is deleted after the block.

    Its file has no name, so that even a killed process leaves nothing behind.

    Raises:
        DataError: the disk is full, or the folder for temporary files cannot be written.
    """
    with closing(sqlite3.connect("")) as database:
        database.execute(f"PRAGMA cache_size = -{_SCRATCH_KIB}")
        database.execute("PRAGMA temp_store = FILE")  # for sorting and grouping
        database.execute("PRAGMA journal_mode = OFF")  # nothing is ever rolled back
        try:
            yield database
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname not in _SCRATCH_ERRORS:
                raise
            raise DataError(
                f"temporary files: {error} ({error.sqlite_errorname}). A manifest's rows are kept on "
                "disk and take about as many bytes as it has. Set SQLITE_TMPDIR to a folder with room."
            ) from error
