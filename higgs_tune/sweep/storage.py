"""The database of `tune.storage`: how it is opened, and what follows when it fails.

SQLAlchemy, a quarter of a second, is imported where there is one.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from optuna.exceptions import StorageInternalError

from higgs_tune.errors import ConfigError, SweepError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import URL

WAITS_S = (0.5, 1.0, 2.0, 4.0)  # between the tries of a write; the sweep's heartbeat waits too
# What pip calls the Python packages that are not called as they are imported.
PACKAGES = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}
Arguments = ParamSpec("Arguments")


def database_errors() -> tuple[type[Exception], ...]:
    """What Optuna and SQLAlchemy raise of a database."""
    sqlalchemy = sys.modules.get("sqlalchemy.exc")
    return (StorageInternalError, *([sqlalchemy.SQLAlchemyError] if sqlalchemy else []))


def open_storage(url: str) -> "RDBStorage":
    """Connect to the database, and make Optuna's tables in a new one.

    Raises:
        ConfigError: the URL is none, its driver is not installed, or the database cannot be used.
            It never tells the password.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import NoSuchModuleError

    parsed = _parse(url)
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # after a server's restart
    except NoSuchModuleError:
        _refuse(
            f": there is no kind of database called {parsed.drivername}. Needed is one that "
            "SQLAlchemy knows, such as sqlite, postgresql or mysql. Correct it, or install the "
            "package that adds it."
        )
    except ImportError as error:
        _refuse(_missing_driver(parsed, error.__cause__ or error))
    except database_errors() as error:
        is_file = parsed.get_backend_name() == "sqlite"
        advice = (
            "Needed is a file in a folder that is there, and both writable. Make the folder, or "
            "give another path."
            if is_file
            else "Needed is a server that answers and lets this user make tables. Start it, or "
            "correct the URL."
        )
        _refuse(f" ({_place(parsed)}) cannot be opened: {_reason(error, parsed)}. {advice}")
    except RuntimeError as error:  # of another version of Optuna; its text says what to run
        _refuse(f" ({_place(parsed)}) cannot be used: {error}")


@contextmanager
def storage_faults(url: str | None) -> Iterator[None]:
    """Turn an error of the database into one that says what to do."""
    try:
        yield
    except database_errors() as error:
        raise storage_error(url, error) from None


def storage_error(url: str | None, error: Exception) -> SweepError:
    """What to tell a person whose study cannot be read or written."""
    from sqlalchemy.engine import make_url

    assert url is not None  # a journal raises an OSError
    parsed = make_url(url)
    return SweepError(
        f"tune.storage ({_place(parsed)}): the study cannot be read or written: "
        f"{_reason(error, parsed)}. What was recorded is kept. Mend the database, or the way to "
        "it; then go on with --resume."
    )


def retried(
    write: Callable[Arguments, Any], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> None:
    """Do a write; one that the database refuses is tried again after a short wait.

    Only for what may be done twice: a write that failed may have happened, and its answer got lost.
    So it is with a value that is set, and never with a trial that is asked for.
    """
    for wait_s in WAITS_S:
        try:
            write(*args, **kwargs)
            return
        except database_errors():
            time.sleep(wait_s)
    write(*args, **kwargs)


def _parse(url: str) -> "URL":
    """The parts of the URL; what cannot be told apart may hold a password, and is not shown."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url.format(SCHEMA_VERSION="")  # as Optuna does with it
        return make_url(url)
    except (ArgumentError, ValueError, KeyError, IndexError):
        _refuse(
            ": what is set is no URL of a database. Needed is sqlite:///FILE or "
            "KIND://USER:PASSWORD@HOST/NAME. Write one; in a password stand %40 for @, %3A for :, "
            "%2F for /, %7B and %7D for braces."
        )


def _refuse(text: str) -> NoReturn:
    raise ConfigError(f"tune.storage{text}") from None


def _missing_driver(url: "URL", error: BaseException) -> str:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if name is None:
        return f": the driver of {url.drivername} cannot be loaded: {error}. Install it again."
    return (
        f": {url.drivername} needs the Python package {name}, which is not installed. "
        f"pip install '{PACKAGES.get(name, name)}', or name another driver: "
        f"{url.get_backend_name()}+DRIVER://..."
    )


def _place(url: "URL") -> str:
    """Which database, without user, password and query."""
    path = f"{url.host or ''}/{url.database or ''}"
    # A password with an @ of its own is taken for a part of the address.
    return url.drivername if "@" in path else f"{url.drivername}://{path}"


def _reason(error: BaseException, url: "URL") -> str:
    """What the driver says, in a line."""
    from sqlalchemy.exc import DBAPIError

    if isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    told = error.orig if isinstance(error, DBAPIError) else error
    line = (str(told).strip() or type(told).__name__).splitlines()[0]
    secrets = [url.password, *(v for k, v in url.query.items() if "pass" in k.lower())]
    for secret in secrets:
        if secret:
            line = line.replace(str(secret), "***")
    return line.rstrip(".")
