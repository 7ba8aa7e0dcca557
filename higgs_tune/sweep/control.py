"""What ends a sweep early: signals, errors of the host's disk, a base that cannot be loaded."""

import signal
from typing import Any

from ray.tune import Stopper

from higgs_tune.train.signals import StopRequest


class Control(Stopper):
    """Whether to stop, and why; Tune asks it too. The first reason wins."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self.error: Exception | None = None

    @property
    def stopping(self) -> bool:
        """Whether the sweep is to end now."""
        return self.request.number is not None or self.error is not None

    @property
    def reason(self) -> str:
        """For the records of the trials that are cancelled."""
        if self.request.number is not None:
            return f"interrupted by {signal.Signals(self.request.number).name}"
        return f"the sweep ended with an error: {self.error}"

    def fail(self, error: Exception) -> None:
        """End the sweep with an error."""
        if not self.stopping:
            self.error = error

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole sweep is to stop."""
        return self.stopping

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its settings for Tuner.restore, which this package never uses."""
        return {}
