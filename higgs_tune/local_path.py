"""Paths that a user gives. `Path` would silently turn an s3:// address into a folder named `s3:`."""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from higgs_tune.errors import ConfigError


def _local(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"{text} is an address, needed a path on this machine. Copy inputs here first, or "
            "copy results there afterwards."
        )
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{text} is in the home of a user that this machine does not have"
        ) from None
    return text


LocalPath = Annotated[str, AfterValidator(_local)]


def local_path(text: str) -> Path:
    """The path in a command's argument; expands `~`, which shells leave as it is in `--out=~/x`.

    Raises:
        ArgumentTypeError: it is an address, such as s3://bucket/folder, or in an unknown user's home.
    """
    try:
        return Path(_local(text)).expanduser()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def refuse_existing(out: Path) -> None:
    """Refuse to replace what the user has.

    Raises:
        ConfigError: there is a file or folder of that name.
    """
    if out.exists():
        raise ConfigError(f"--out: {out} exists, and nothing is replaced. Give another name.")
