"""Answers to trials that wait for their next result."""

import asyncio

from higgs_tune.sweep.seats import Result


class Answers:
    """Holds one pending answer per trial; one that was cancelled meanwhile is skipped."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[Result]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def ask(self, trial_id: str) -> "asyncio.Future[Result]":
        """A future for the trial's next result; an earlier one of the same trial is never answered."""
        self._open[trial_id] = asyncio.get_running_loop().create_future()
        return self._open[trial_id]

    def give(self, trial_id: str, result: Result) -> None:
        """Answer a waiting trial with its next result."""
        future = self._open.pop(trial_id)
        if not future.done():
            future.set_result(result)

    def give_all(self, result: Result) -> None:
        """Answer all waiting trials with the same result."""
        for trial_id in list(self._open):
            self.give(trial_id, result)

    def fail(self, trial_id: str, error: Exception) -> None:
        """Answer the trial with an error, if it is waiting."""
        future = self._open.pop(trial_id, None)
        if future is not None and not future.done():
            future.set_exception(error)
