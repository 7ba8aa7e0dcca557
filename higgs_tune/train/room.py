"""Go on when memory runs out in a forward or a backward: fewer adapters at once, then shorter forwards.

A CPU computes each adapter in forwards of its own from the start. A pack's shared matmuls gain little
there, and so what an adapter computes does not depend on whose company it is in, to the last bit. Alone
it has all threads (see `lanes`), and with more than one its sums round otherwise than in company.
"""

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch

from higgs_tune.data.tokens import Encoded
from higgs_tune.train.lanes import Lanes
from higgs_tune.train.parallel import World

logger = logging.getLogger(__name__)
T = TypeVar("T")
Group = tuple[int, ...]  # slots


@dataclass(frozen=True)
class NoRoom:
    """Not even a single clip of this adapter fits."""

    reason: str


@dataclass(frozen=True)
class Work(Generic[T]):
    """A computation over some slots that may be cut up and done again."""

    name: str  # for messages
    advice: str  # which setting keeps memory from running out
    attempt: Callable[[Group], dict[int, T]]
    parts: Callable[[int], Sequence[Sequence[Encoded]]]  # a slot's forwards within its `budget`
    discard: Callable[[Group], None]  # forget what a failed attempt has left behind


@dataclass(frozen=True)
class _Failed:
    group: Group
    message: str


class Room:
    """How much may be computed at once: everything, until memory has run out."""

    def __init__(self, device: torch.device, lanes: Lanes) -> None:
        self._lanes, self._device = lanes, device
        self._budgets: dict[int, int] = {}
        self.forget(())

    def forget(self, slots: Iterable[int]) -> None:
        """An adapter has left: its neighbours may fit side by side again, so that is tried once more.

        A shorter forward of one that stays was needed while it computed alone, so it keeps it.
        """
        self.width: int | None = 1 if self._device.type == "cpu" else None  # adapters in a forward
        self._side_by_side = True  # several lanes at a time
        for slot in slots:
            self._budgets.pop(slot, None)

    def budget(self, slot: int, setting: int) -> int:
        """Padded rows in one forward of an adapter, `setting` if memory allows."""
        return min(setting, self._budgets.get(slot, setting))

    def run(self, groups: Sequence[Group], work: Work[T]) -> dict[int, T | NoRoom]:
        """Results of every slot.

        Args:
            groups: the slots that may be computed at the same time as others.
        """
        done: dict[int, T | NoRoom] = {}
        pieces = [piece for group in groups for piece in self._pieces(group)]
        tasks = [partial(self._once, piece, work) for piece in pieces]
        together = self._side_by_side and len(groups) > 1
        todo: list[Group] = []
        for outcome in self._lanes.run(tasks) if together else [task() for task in tasks]:
            if not isinstance(outcome, _Failed):
                done |= outcome
                continue
            work.discard(outcome.group)
            if together:  # once more, while nobody else needs memory
                if self._side_by_side:
                    self._side_by_side = False
                    self._warn(outcome, work, "the CPU's lanes wait for each other")
                todo.append(outcome.group)
            else:
                todo += self._smaller(outcome, work, done)
        while todo:
            self._give_back()
            outcome = self._once(todo.pop(0), work)
            if isinstance(outcome, _Failed):
                work.discard(outcome.group)
                todo = [*self._smaller(outcome, work, done), *todo]
            else:
                done |= outcome
            todo = [piece for group in todo for piece in self._pieces(group)]
        return done

    def _once(self, group: Group, work: Work[T]) -> dict[int, T] | _Failed:
        """Try it; what the attempt held is free when this returns, because its exception is."""
        try:
            return work.attempt(group)
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            if not is_out_of_memory(error):
                raise
            return _Failed(group, str(error).splitlines()[0] if str(error) else "out of memory")

    def _pieces(self, group: Group) -> list[Group]:
        width = self.width or len(group)
        return [group[first : first + width] for first in range(0, len(group), width)]

    def _smaller(
        self, failed: _Failed, work: Work[T], done: dict[int, T | NoRoom]
    ) -> Sequence[Group]:
        """What to try instead; nothing, and an end in `done`, if there is nothing smaller."""
        group = failed.group
        if len(group) > 1:
            self.width = -(-len(group) // 2)
            self._warn(failed, work, f"{self.width} at a time from now on, till a trial leaves")
            return self._pieces(group)
        assert len(group) == 1
        slot = group[0]
        several = [part for part in work.parts(slot) if len(part) > 1]
        if not several:
            done[slot] = NoRoom(f"one clip does not fit in a {work.name}: {failed.message}")
            return []
        rows = max(len(part) * max(e.num_rows for e in part) for part in several)
        self._budgets[slot] = rows // 2
        self._warn(failed, work, f"forwards of {rows // 2} rows from now on")
        return [group]

    def _warn(self, failed: _Failed, work: Work[T], done: str) -> None:
        logger.warning(
            "memory ran out in a %s of %d adapter(s): done again, %s. To avoid it, lower %s. (%s)",
            work.name,
            len(failed.group),
            done,
            work.advice,
            failed.message,
        )

    def _give_back(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def agree(results: dict[int, T | NoRoom], world: World) -> dict[int, T | NoRoom]:
    """The results, with no room in any process where one had none."""
    agreed: dict[int, T | NoRoom] = {}
    for slot, result in results.items():
        lost = world.any(isinstance(result, NoRoom))
        elsewhere = lost and not isinstance(result, NoRoom)
        agreed[slot] = NoRoom("memory ran out in another process") if elsewhere else result
    return agreed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )
