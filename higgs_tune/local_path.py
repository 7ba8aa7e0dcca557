"""Paths that a user gives. `Path` would make a folder named `s3:` of an address without a word."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from higgs_tune.errors import ConfigError


def _local(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text} is an address, needed a path on this machine. Copy what lies there here, or what "
            "is made here there afterwards."
        )
    return text


LocalPath = Annotated[str, AfterValidator(_local)]


def local_path(text: str) -> Path:
    """The path of a command's argument; `~` is the home folder, which shells leave in `--out=~/x`.

    Raises:
        ArgumentTypeError: it is an address, such as s3://bucket/folder.
    """
    try:
        return Path(_local(text)).expanduser()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def refuse_existing(out: Path) -> None:
    """Keep a command from replacing what the user has.

    Raises:
        ConfigError: there is a file or folder of that name.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists. Give a name that does not, nothing is replaced.")
