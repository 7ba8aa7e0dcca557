"""The one thread on which a pack computes, and a check that it makes progress.

A GPU, a disk or a network share that hangs raises nothing: the call that waits for it never returns, while
the process goes on answering. Without this check such a worker would keep its trials for ever.
"""

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

WARN_BEATS = 900  # heartbeats, one a second, without a forward until the user is warned
END_BEATS = 1800  # until the process is ended
_FRAMES = 12  # of the stack in the warning


class PackThread:
    """Runs one call at a time beside the event loop."""

    def __init__(self, *, ends: bool) -> None:
        """Start the thread with its first call.

        Args:
            ends: whether a stall ends the process; false with torch.compile, which may take as long.
        """
        self._executor = ThreadPoolExecutor(1, "pack", initializer=self._note_thread)
        self._thread_id: int | None = None
        self._ends = ends
        self._num_calls = 0
        self._last: asyncio.Future | None = None  # the newest call; once it is done, all are
        self._seen = (0, 0)  # calls and forwards at the last heartbeat
        self._beats = 0  # since either changed

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Run `work` once all earlier calls are done."""
        future = asyncio.get_running_loop().run_in_executor(self._executor, work)
        self._num_calls += 1
        self._last = future
        return future

    def beat(self, num_forwards: int) -> bool:
        """Count a heartbeat; returns whether the thread has hung for so long that the process must end.

        Args:
            num_forwards: the pack's forwards so far.
        """
        seen = (self._num_calls, num_forwards)
        if seen != self._seen or self._last is None or self._last.done():
            self._seen, self._beats = seen, 0
            return False
        self._beats += 1
        if self._beats == WARN_BEATS:
            logger.warning(
                "the pack (process %d) has computed nothing for %.0f minutes: its GPU, a disk or the "
                "network may hang. %s. Its stack is:\n%s",
                os.getpid(),
                WARN_BEATS / 60,
                f"It will be ended after {END_BEATS / 60:.0f}"
                if self._ends
                else "Unless torch.compile is at work, kill the process: its trials go on in a new one",
                self._stack(),
            )
        return self._ends and self._beats >= END_BEATS

    def _note_thread(self) -> None:
        self._thread_id = threading.get_ident()

    def _stack(self) -> str:
        frame = None if self._thread_id is None else sys._current_frames().get(self._thread_id)
        return "".join(traceback.format_stack(frame)[-_FRAMES:]) if frame else "(no stack)"
