"""File work on a thread of its own, so that Tune's loop need not wait while gigabytes are written."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Later:
    """Runs the work that it is given on one thread, in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "files")
        self._newest: dict[str, Future[Any]] = {}  # by trial
        self._unchecked: list[Future[Any]] = []

    def do(self, trial_id: str, work: Callable[[], Any]) -> None:
        """Queue work for a trial.

        First waits for the trial's earlier work, so that each trial has one item outstanding at most.
        """
        self.wait(trial_id)
        self._newest[trial_id] = self.queue(work)

    def queue(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue work that runs after everything queued before."""
        future = self._thread.submit(work)
        self._unchecked.append(future)
        return future

    def wait(self, trial_id: str) -> None:
        """Wait until all of a trial's work is done; `check` raises its errors."""
        if trial_id in self._newest:
            wait([self._newest.pop(trial_id)])

    def check(self) -> None:
        """Raise the first error of the work that was finished since the last call."""
        done = [future for future in self._unchecked if future.done()]
        self._unchecked = [future for future in self._unchecked if future not in done]
        for future in done:
            future.result()

    def finish(self) -> None:
        """Wait for all work, and raise its first error."""
        wait(self._unchecked)
        self.check()
