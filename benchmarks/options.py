"""Shared parts of the benchmarks' command lines: number types, the results file, one-line errors."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from higgs_tune.errors import HiggsTuneError


def new_parser(text: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as its help, with its line breaks."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(lowest: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    """An argparse type: numbers of `kind` that are at least `lowest`."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= lowest:  # also refuses NaN
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"found {text!r}, needs {what} of at least {lowest}")
        return value

    return number


def ascending(text: str) -> list[int]:
    """An argparse type: distinct whole numbers of at least 1, sorted, from text such as "4,1,2"."""
    return sorted({at_least(1)(part) for part in text.split(",")})


def json_file(text: str) -> Path:
    """An argparse type: the results file. Checked here, before anything is measured for it."""
    path = Path(text).expanduser()
    if path.suffix != ".json" or path.is_dir():  # the picture beside it ends in .png
        raise argparse.ArgumentTypeError(f"found {text!r}, needs a file that ends in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path.parent}: cannot write a file there")
    return path


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that the user can fix ends it with one line."""
    try:
        main()
    except HiggsTuneError as error:
        raise SystemExit(f"error: {error}") from None
