"""Lanes: the cores of a CPU compute different adapters of a pack side by side.

A step of small matmuls gains little from a second core, because the cores wait for each other after every
operation. With more than one adapter, each core takes whole adapters instead and waits once per step. Of the
lanes that training fills, all but one are processes where possible (`lane_process`), else threads. A GPU has
one lane, in which adapters share forwards.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

from higgs_tune.train.forwards import Costs, Rows, num_rows, share_forwards
from higgs_tune.train.lane_process import LaneLostError, LaneProcess

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Lanes:
    """As many lanes as torch has threads, each computing on one core; a single one on a GPU."""

    def __init__(self, device: torch.device, costs: Costs | None = None) -> None:
        """In a single lane, `costs` decides which adapters share a forward; None: all do."""
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.costs = costs
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[LaneProcess] = []  # not yet assigned to a lane
        self._here = threading.local()

    def fork(self, answer: Callable[..., Any], most: int) -> None:
        """Start a process for each lane but one.

        Args:
            answer: runs in each process on its lane's number, from 1, and the arguments of a call.
            most: lanes that training can fill; any others are threads.
        """
        try:
            for number in range(1, min(self.count, most)):
                self._processes.append(LaneProcess(partial(answer, number)))
        except LaneLostError as error:
            logger.warning(
                "the %d cores take turns in Python, which may cost a third of the speed: %s",
                self.count,
                error,
            )
            self._processes = []

    @property
    def process(self) -> LaneProcess | None:
        """The calling lane's process; None if the lane computes in this one."""
        return getattr(self._here, "process", None)

    def groups(self, rows: Mapping[int, Rows]) -> list[tuple[int, ...]]:
        """Slots of each forward, those with the most rows first.

        With several lanes each slot has its own forward. A lane takes the next as soon as it is free, so
        the last ones are short.
        """
        if self.count == 1:
            return [tuple(sorted(rows))] if self.costs is None else share_forwards(rows, self.costs)
        return [(slot,) for slot in sorted(rows, key=lambda slot: (-num_rows(rows[slot]), slot))]

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run all tasks and return their results in order; a single task runs here, on every core.

        Several cores split sums differently from one core, so a single task rounds differently.
        """
        if len(tasks) < 2 or self.count < 2:
            return [task() for task in tasks]
        if self._threads is None:
            begin = partial(_begin, self._here, self._processes)
            self._threads = ThreadPoolExecutor(self.count, "lane", initializer=begin)
        futures = [self._threads.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:  # if one fails, no other may still be computing when this returns
            for future in futures:
                future.cancel()
            wait(futures)


def _begin(here: threading.local, processes: list[LaneProcess]) -> None:
    torch.set_num_threads(1)
    try:
        here.process = processes.pop()
    except IndexError:  # the lane that computes in this process
        here.process = None
