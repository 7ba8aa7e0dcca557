"""What ends a sweep early: a signal, or an error such as a full disk or a base that cannot be loaded."""

import signal

from higgs_tune.train.signals import StopRequest


class Control:
    """Whether to stop, and why. The first reason wins."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether the sweep must end now."""
        return self.request.number is not None or self.error is not None

    @property
    def reason(self) -> str:
        """Why the sweep ends, for the records of cancelled trials."""
        if self.request.number is not None:
            return f"interrupted by {signal.Signals(self.request.number).name}"
        return f"the sweep ended with an error: {self.error}"

    def fail(self, error: Exception) -> None:
        """End the sweep with an error, unless it is ending already."""
        if not self.stopping:
            self.error = error
