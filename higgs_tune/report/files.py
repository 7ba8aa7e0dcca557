"""A copy of a folder that two processes may make at once: a sweep and `higgs-tune report`."""

import os
import shutil
from pathlib import Path


def copy_folder(source: Path, target: Path, *, leave_out: tuple[str, ...]) -> None:
    """Make `target` a copy of the folder `source`; an older `target` goes only after the copy is whole.

    Args:
        source: folder to copy.
        target: folder to make.
        leave_out: patterns of file names that are not copied.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(*leave_out))
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        for leftover in (fresh, old):
            if leftover.exists():
                shutil.rmtree(leftover)
