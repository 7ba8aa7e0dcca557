"""SIGTERM and Ctrl-C end a run after the step that it is in, and a sweep with what it has."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """The number of the signal that asked for the end, if one did."""

    number: int | None = None


@contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
    """Note the first SIGTERM or SIGINT; a Ctrl-C after it ends the process at once.

    A second SIGTERM does not: launchers pass on to all processes what their manager has sent to all.

    Outside of the main thread, which alone can handle signals, nothing is ever asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number is None:
            request.number = number
        elif number == signal.SIGINT:
            os._exit(128 + number)

    former = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
