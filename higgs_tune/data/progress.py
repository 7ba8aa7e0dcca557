"""Show the progress of long work on stderr: a bar on a terminal, an occasional line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 10.0

Advance = Callable[[int], None]


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Yield a function to call with the number of items, of `total`, done since the last call."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        yield _lines(title, total)


def _lines(title: str, total: int) -> Advance:
    started = last = 0.0
    done = first = 0

    def advance(count: int) -> None:
        nonlocal done, first, last, started
        done += count
        now = time.monotonic()
        if not first and done < total:  # time from here: what came before, such as loading, is over
            first, started, last = done, now, now
        if now - last < _LINE_EVERY_S and done < total:
            return
        last = now
        left = (now - started) / max(1, done - first) * (total - done)
        print(f"{title}: {done}/{total}, about {left:.0f} s left", file=sys.stderr, flush=True)

    return advance


def duration(seconds: float) -> str:
    """Format seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
