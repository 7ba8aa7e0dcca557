"""Open the database of `tune.storage`, and handle its failures.

SQLAlchemy takes a quarter of a second to import, so it is imported only if there is a database.
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

RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0)  # between attempts of a write; heartbeats wait, too
# pip's names for drivers whose modules are named differently.
PACKAGES = {"MySQLdb": "mysqlclient", "psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}
Arguments = ParamSpec("Arguments")


def database_errors() -> tuple[type[Exception], ...]:
    """The exceptions that Optuna and SQLAlchemy raise when a database fails."""
    sqlalchemy = sys.modules.get("sqlalchemy.exc")
    return (StorageInternalError, *([sqlalchemy.SQLAlchemyError] if sqlalchemy else []))


def open_storage(url: str) -> "RDBStorage":
    """Connect to the database, and create Optuna's tables in a new one.

    Raises:
        ConfigError: the URL is invalid, its driver is not installed, or the database cannot be used.
            It never shows the password.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import NoSuchModuleError

    parsed = _parse(url)
    try:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # the server may restart
    except NoSuchModuleError:
        _refuse(
            f": SQLAlchemy knows no kind of database called {parsed.drivername}. Needed: a kind such "
            "as sqlite, postgresql or mysql. Correct it, or install the package that adds it."
        )
    except ImportError as error:
        _refuse(_missing_driver(parsed, error.__cause__ or error))
    except database_errors() as error:
        is_file = parsed.get_backend_name() == "sqlite"
        advice = (
            "Needed: a file in an existing folder, both writable. Create the folder, or give "
            "another path."
            if is_file
            else "Needed: a server that answers and lets this user create tables. Start it, or "
            "correct the URL."
        )
        _refuse(f" ({_place(parsed)}) cannot be opened: {_reason(error, parsed)}. {advice}")
    except RuntimeError as error:  # tables of another Optuna version; its text says what to run
        _refuse(f" ({_place(parsed)}) cannot be used: {error}")


@contextmanager
def storage_faults(url: str | None) -> Iterator[None]:
    """Turn a database's errors into ones that say what to do."""
    try:
        yield
    except database_errors() as error:
        raise storage_error(url, error) from None


def storage_error(url: str | None, error: Exception) -> SweepError:
    """The error for a study that cannot be read or written."""
    from sqlalchemy.engine import make_url

    assert url is not None  # a journal raises an OSError
    parsed = make_url(url)
    return SweepError(
        f"tune.storage ({_place(parsed)}): the study cannot be read or written: "
        f"{_reason(error, parsed)}. What was recorded is kept. Repair the database or the connection "
        "to it; then continue with --resume."
    )


def retried(
    write: Callable[Arguments, Any], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> None:
    """Do a write; retry it after a short wait if the database fails.

    Only for writes that may happen twice, because a failed one may have succeeded with its answer lost.
    Setting a value may happen twice, asking for a trial may not.
    """
    for wait_s in RETRY_DELAYS_S:
        try:
            write(*args, **kwargs)
            return
        except database_errors():
            time.sleep(wait_s)
    write(*args, **kwargs)


def _parse(url: str) -> "URL":
    """The parsed URL; one that cannot be parsed may hold a password, so the error does not show it."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url.format(SCHEMA_VERSION="")  # as Optuna does
        return make_url(url)
    except (ArgumentError, ValueError, KeyError, IndexError):
        _refuse(
            ": the value is not the URL of a database. Needed: sqlite:///FILE or "
            "KIND://USER:PASSWORD@HOST/NAME. Set one; in a password write %40 for @, %3A for :, "
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
    """The database's address, without user, password and query."""
    path = f"{url.host or ''}/{url.database or ''}"
    # If a password contains an @, a part of it ends up in the address.
    return url.drivername if "@" in path else f"{url.drivername}://{path}"


def _reason(error: BaseException, url: "URL") -> str:
    """The driver's message, in one line and without passwords."""
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
