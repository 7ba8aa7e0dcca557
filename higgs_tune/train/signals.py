"""SIGTERM, SIGHUP and Ctrl-C end a run after its current step, and a sweep with the results so far."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """The number of the signal that asked to stop, if one did."""

    number: int | None = None


@contextmanager
def stop_signals(request: StopRequest) -> Iterator[None]:
    """Note the first of `SIGNALS` in `request`; a Ctrl-C after it ends the process at once.

    A second SIGTERM does not: launchers forward to all processes what their manager has sent to all.
    SIGHUP says that the terminal is gone, so nothing is printed there any more; under `nohup` it stays
    ignored.

    Outside the main thread, which alone can handle signals, no signal is noted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in terminals:
                os.dup2(nowhere, fd)
            os.close(nowhere)
        if request.number is None:
            request.number = number
        elif number == signal.SIGINT:
            os._exit(128 + number)

    wanted = [n for n in SIGNALS if (n, signal.getsignal(n)) != (signal.SIGHUP, signal.SIG_IGN)]
    former = {number: signal.signal(number, handle) for number in wanted}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as `sys.exit` does; Ray's own handler would first print a stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
