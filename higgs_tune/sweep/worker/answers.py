"""Trials that wait for their next result, and what they are told."""

import asyncio

from higgs_tune.sweep.seats import Result


class Answers:
    """One open question a trial; who has already gone away is told nothing."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Future[Result]] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def ask(self, trial_id: str) -> "asyncio.Future[Result]":
        """What the trial waits for from now on; an earlier question of it stays without an answer."""
        self._open[trial_id] = asyncio.get_running_loop().create_future()
        return self._open[trial_id]

    def give(self, trial_id: str, result: Result) -> None:
        """Its next result."""
        future = self._open.pop(trial_id)
        if not future.done():
            future.set_result(result)

    def give_all(self, result: Result) -> None:
        """The same to everyone who waits."""
        for trial_id in list(self._open):
            self.give(trial_id, result)

    def fail(self, trial_id: str, error: Exception) -> None:
        """There will be none, if it waits for one."""
        future = self._open.pop(trial_id, None)
        if future is not None and not future.done():
            future.set_exception(error)
