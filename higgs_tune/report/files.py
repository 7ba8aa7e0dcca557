"""Write files so that a reader sees either the old or the whole new one."""

import os
import shutil
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by UTF-8 text in one step."""
    write_bytes(path, content.encode("utf-8"))


def replace_folder(source: Path, target: Path, *, leave_out: tuple[str, ...]) -> None:
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
