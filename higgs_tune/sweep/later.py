"""Work on files beside Tune's loop, which would otherwise stand still while gigabytes reach the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Later:
    """Does what it is given on a thread of its own, one after the other."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "files")
        self._newest: dict[str, Future[Any]] = {}  # by trial
        self._unchecked: list[Future[Any]] = []

    def do(self, trial_id: str, work: Callable[[], Any]) -> None:
        """Do something for a trial, after all that was given before.

        Waits for what was given for this trial before: of each, one thing at most is outstanding.
        """
        self.wait(trial_id)
        self._newest[trial_id] = self.queue(work)

    def queue(self, work: Callable[[], Any]) -> Future[Any]:
        """Do something after all that was given before."""
        future = self._thread.submit(work)
        self._unchecked.append(future)
        return future

    def wait(self, trial_id: str) -> None:
        """Wait until all that was given for a trial is done; an error waits for `check`."""
        if trial_id in self._newest:
            wait([self._newest.pop(trial_id)])

    def check(self) -> None:
        """Raise the first error of what has been done since the last call."""
        done = [future for future in self._unchecked if future.done()]
        self._unchecked = [future for future in self._unchecked if future not in done]
        for future in done:
            future.result()

    def finish(self) -> None:
        """Wait for everything, and raise its first error."""
        wait(self._unchecked)
        self.check()
