"""What ends a sweep early: signals, errors of the host's disk, a base that cannot be loaded."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray.tune import Stopper

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Control:
    """Whether to stop, and why. The first reason wins."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether the sweep is to end now."""
        return self.signal is not None or self.error is not None

    @property
    def reason(self) -> str:
        """For the records of the trials that are cancelled."""
        if self.signal is not None:
            return f"interrupted by {self.signal.name}"
        return f"the sweep ended with an error: {self.error}"

    def fail(self, error: Exception) -> None:
        """End the sweep with an error."""
        if not self.stopping:
            self.error = error


class ControlStopper(Stopper):
    """Passes a Control's wish on to Tune."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole sweep is to stop."""
        return self._control.stopping

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its settings for Tuner.restore, which this package never uses."""
        return {}


@contextmanager
def signals(control: Control) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a clean end; a Ctrl-C after that ends the process at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if control.signal is None:
            control.signal = signal.Signals(number)
        elif number == signal.SIGINT:
            os._exit(EXIT_CODES[signal.SIGINT])

    former = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
