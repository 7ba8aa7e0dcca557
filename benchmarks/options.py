"""What every benchmark's command line has: bounds, the file of the results, errors of one line."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs_tune.errors import HiggsTuneError


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """The parser of a script whose docstring is its help, line by line."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(lowest: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """An argparse type: numbers of a kind, from `lowest` on."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= lowest:  # NaN is not
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, needs {what} of at least {lowest}")
        return value

    return number


def ascending(text: str) -> list[int]:
    """An argparse type: different numbers from 1 on, ascending, from "4,1,2"."""
    return sorted({at_least(1)(part) for part in text.split(",")})


def json_file(text: str) -> Path:
    """An argparse type: where the results go. Refused before anything is measured for it."""
    path = Path(text).expanduser()
    if path.suffix != ".json" or path.is_dir():  # the picture beside it ends in .png
        raise argparse.ArgumentTypeError(f"found {text!r}, needs a file that ends in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path.parent}: no file can be written there")
    return path


def run(main: Callable[[], None]) -> None:
    """Be a script; what its user can mend ends it with one line."""
    try:
        main()
    except HiggsTuneError as error:
        raise SystemExit(f"error: {error}") from None
