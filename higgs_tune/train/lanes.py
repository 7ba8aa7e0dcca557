"""Parts of a pack computed side by side on a CPU.

A step of small matmuls gains little from a second core: the cores wait for each other after every
operation. With more than one adapter each core takes adapters of its own instead, and waits once a step.
All lanes that training fills but one are processes where that can be (`lane_process`), else threads.
A GPU has one lane, in which adapters share forwards.
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
    """As many as torch has threads, each computing on one core."""

    def __init__(self, device: torch.device, costs: Costs | None = None) -> None:
        """`costs` says when adapters have forwards of their own in a single lane; None: never."""
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.costs = costs
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[LaneProcess] = []  # of lanes that have not begun
        self._here = threading.local()

    def fork(self, answer: Callable[..., Any], most: int) -> None:
        """Give lanes a process each, all but one of them.

        Args:
            answer: what each does with its number, from 1, and the arguments of a call.
            most: lanes that are filled in training; further ones are threads.
        """
        try:
            for number in range(1, min(self.count, most)):
                self._processes.append(LaneProcess(partial(answer, number)))
        except LaneLostError as error:
            logger.warning(
                "the %d cores take turns in Python, which may cost a third: %s", self.count, error
            )
            self._processes = []

    @property
    def process(self) -> LaneProcess | None:
        """That of the lane in which this is asked."""
        return getattr(self._here, "process", None)

    def groups(self, rows: Mapping[int, Rows]) -> list[tuple[int, ...]]:
        """Slots of each forward, those with the most rows first.

        With several lanes each slot has its own. A lane takes the next as soon as it is free, so the last
        ones are short.
        """
        if self.count == 1:
            return [tuple(sorted(rows))] if self.costs is None else share_forwards(rows, self.costs)
        return [(slot,) for slot in sorted(rows, key=lambda slot: (-num_rows(rows[slot]), slot))]

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Results of all tasks in their order; a single one runs here, on every core.

        The cores cut its sums otherwise than one core does: it rounds otherwise than in company.
        """
        if len(tasks) < 2 or self.count < 2:
            return [task() for task in tasks]
        if self._threads is None:
            begin = partial(_begin, self._here, self._processes)
            self._threads = ThreadPoolExecutor(self.count, "lane", initializer=begin)
        futures = [self._threads.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:  # when one fails, nobody may still compute behind the caller's back
            for future in futures:
                future.cancel()
            wait(futures)


def _begin(here: threading.local, processes: list[LaneProcess]) -> None:
    torch.set_num_threads(1)
    try:
        here.process = processes.pop()
    except IndexError:  # the lane that computes in this process
        here.process = None
