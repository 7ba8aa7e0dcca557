"""SIGTERM and Ctrl-C end a run after the step that it is in."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass
class StopRequest:
    """The number of the signal that asked for the end, if one did."""

    number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the first SIGTERM or SIGINT; a Ctrl-C after it ends the process at once.

    A second SIGTERM does not: launchers pass on to all processes what their manager has sent to all.

    Outside of the main thread, which alone can handle signals, nothing is ever asked for.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number is None:
            request.number = number
        elif number == signal.SIGINT:
            os._exit(EXIT_CODES[signal.SIGINT])

    former = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
