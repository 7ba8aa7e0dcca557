"""Threads that compute parts of a pack side by side on a CPU.

A step of small matmuls gains little from a second core: the cores wait for each other after every
operation. With more than one adapter each core takes adapters of its own instead, and waits once a step.
A GPU has one lane, in which adapters share forwards.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from higgs_tune.train.forwards import Costs, Rows, num_rows, share_forwards

T = TypeVar("T")


class Lanes:
    """As many threads as torch has cores, each computing on one."""

    def __init__(self, device: torch.device, costs: Costs | None = None) -> None:
        """`costs` says when adapters have forwards of their own in a single lane; None: never."""
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self.costs = costs
        self._threads: ThreadPoolExecutor | None = None

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
            self._threads = ThreadPoolExecutor(
                self.count, "lane", initializer=torch.set_num_threads, initargs=(1,)
            )
        futures = [self._threads.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:  # when one fails, nobody may still compute behind the caller's back
            for future in futures:
                future.cancel()
            wait(futures)
