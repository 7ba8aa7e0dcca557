"""Retries when a forward or a backward fails for some adapters of a pack.

When memory runs out: once more unchanged, on a GPU, whose memory may only be fragmented, or on a CPU if other
lanes computed at the same time; then with fewer adapters at once, then with shorter forwards. After another
error: once more, one adapter at a time. An adapter ends if not even a single clip fits, or if it fails again
by itself; its neighbours go on.

A CPU computes each adapter in forwards of its own from the start: shared matmuls gain little there, and
without them an adapter's results do not depend on its neighbours, to the last bit. Only an adapter that is
alone has all threads (see `lanes`); with more than one thread, its sums round differently.
"""

import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from higgs_tune.data.tokens import Encoded
from higgs_tune.errors import is_out_of_memory, release_frames
from higgs_tune.train.lane_process import LaneLostError
from higgs_tune.train.lanes import Lanes
from higgs_tune.train.parallel import World

logger = logging.getLogger(__name__)
T = TypeVar("T")
Group = tuple[int, ...]  # slots


@dataclass(frozen=True)
class Ended:
    """Why an adapter cannot go on: a MemoryError if not even a single clip fits, or its own error."""

    error: Exception

    @property
    def status(self) -> str:
        """The trial's status."""
        return "out_of_memory" if isinstance(self.error, MemoryError) else "failed"

    @property
    def reason(self) -> str:
        """What happened, in one line."""
        line = _first_line(self.error)
        return (
            line if isinstance(self.error, MemoryError) else f"{type(self.error).__name__}: {line}"
        )


@dataclass(frozen=True)
class Work(Generic[T]):
    """A computation over some slots that can be split up and retried."""

    name: str  # for messages
    advice: str  # which setting keeps memory from running out
    attempt: Callable[[Group], dict[int, T]]
    parts: Callable[[int], Sequence[Sequence[Encoded]]]  # a slot's forwards within its `budget`
    discard: Callable[[Group], None]  # undo what a failed attempt has left behind


@dataclass(frozen=True)
class _Failed:
    group: Group
    error: Exception


class Room:
    """Limits how much is computed at once; no limit until memory has run out."""

    def __init__(self, device: torch.device, lanes: Lanes) -> None:
        self._lanes, self._device = lanes, device
        self._keeps_pieces = device.type == "cuda"  # of freed memory, in the allocator's cache
        self._budgets: dict[int, int] = {}
        self.forget(())

    def forget(self, slots: Iterable[int]) -> None:
        """Adapters have left these slots: let their neighbours try to fit side by side again.

        The neighbours keep their shorter forwards, which each of them needed even alone.
        """
        self.width: int | None = 1 if self._device.type == "cpu" else None  # adapters per forward
        self._side_by_side = True  # lanes compute at the same time
        for slot in slots:
            self._budgets.pop(slot, None)

    def budget(self, slot: int, setting: int) -> int:
        """Most padded rows in one forward of an adapter: `setting`, unless memory has run out."""
        return min(setting, self._budgets.get(slot, setting))

    def run(self, groups: Sequence[Group], work: Work[T]) -> dict[int, T | Ended]:
        """Do the work for every slot, retrying what fails; returns slot → result or `Ended`.

        Args:
            groups: slots that are computed together; several lanes take groups side by side.
        """
        done: dict[int, T | Ended] = {}
        pieces = [piece for group in groups for piece in self._pieces(group)]
        tasks = [partial(self._once, piece, work) for piece in pieces]
        together = self._side_by_side and self._lanes.count > 1 and len(groups) > 1
        todo: list[Group] = []
        tried: set[int] = set()  # slots that have failed other than by lack of memory
        for outcome in self._lanes.run(tasks) if together else [task() for task in tasks]:
            if not isinstance(outcome, _Failed):
                done |= outcome
                continue
            work.discard(outcome.group)
            lacks_memory = isinstance(outcome.error, MemoryError)
            if lacks_memory and together:
                if self._side_by_side:
                    self._side_by_side = False
                    self._warn(outcome, work, "with the CPU's lanes one after the other")
                todo.append(outcome.group)  # when no other lane needs memory
            elif lacks_memory and self._keeps_pieces:
                self._warn(outcome, work, "after all unused memory was given back")
                todo.append(outcome.group)
            else:
                todo += self._next_attempts(outcome, work, done, tried)
        while todo:
            self._give_back()
            outcome = self._once(todo.pop(0), work)
            if isinstance(outcome, _Failed):
                work.discard(outcome.group)
                todo = [*self._next_attempts(outcome, work, done, tried), *todo]
            else:
                done |= outcome
            todo = [piece for group in todo for piece in self._pieces(group)]
        return done

    def _once(self, group: Group, work: Work[T]) -> dict[int, T] | _Failed:
        """Attempt the work once; what a failed attempt held is free when this returns."""
        try:
            return work.attempt(group)
        except LaneLostError:  # no adapter's fault, and retrying cannot help
            raise
        except Exception as error:  # kept and logged; raised if it is not one adapter's
            if is_out_of_memory(error):
                return _Failed(group, MemoryError(_first_line(error) or "out of memory"))
            release_frames(error)
            return _Failed(group, error)

    def _pieces(self, group: Group) -> list[Group]:
        width = self.width or len(group)
        return [group[first : first + width] for first in range(0, len(group), width)]

    def _next_attempts(
        self, failed: _Failed, work: Work[T], done: dict[int, T | Ended], tried: set[int]
    ) -> Sequence[Group]:
        """Groups to try next; none, with an `Ended` in `done`, if nothing is left to try."""
        if isinstance(failed.error, MemoryError):
            return self._smaller(failed, work, done)
        if tried.issuperset(failed.group):
            assert len(failed.group) == 1
            done[failed.group[0]] = Ended(failed.error)
            return []
        logger.warning(
            "a %s of %d adapter(s) failed: retrying one at a time",
            work.name,
            len(failed.group),
            exc_info=failed.error,
        )
        if len(failed.group) > 1:
            self.width = 1  # adapters that fail only together must not do so every step
        tried.update(failed.group)
        return [(slot,) for slot in failed.group]

    def _smaller(
        self, failed: _Failed, work: Work[T], done: dict[int, T | Ended]
    ) -> Sequence[Group]:
        """Groups that may fit; none, with an `Ended` in `done`, if nothing smaller is possible."""
        group = failed.group
        if len(group) > 1:
            self.width = min(self.width or len(group), -(-len(group) // 2))
            self._warn(failed, work, f"with {self.width} at a time until a trial leaves")
            return self._pieces(group)
        assert len(group) == 1
        slot = group[0]
        several = [part for part in work.parts(slot) if len(part) > 1]
        if not several:
            longest = max((e for part in work.parts(slot) for e in part), key=lambda e: e.num_rows)
            reason = (
                f"not even one conversation fits in a {work.name}; the longest, {longest.key}, has "
                f"{longest.num_rows} rows, and data.max_rows leaves longer ones out: {failed.error}"
            )
            done[slot] = Ended(MemoryError(reason))
            return []
        rows = max(len(part) * max(e.num_rows for e in part) for part in several)
        self._budgets[slot] = rows // 2
        self._warn(failed, work, f"with at most {rows // 2} rows in a forward from now on")
        return [group]

    def _warn(self, failed: _Failed, work: Work[T], done: str) -> None:
        logger.warning(
            "memory ran out in a %s of %d adapter(s): retrying %s. To avoid this, lower %s. (%s)",
            work.name,
            len(failed.group),
            done,
            work.advice,
            failed.error,
        )

    def _give_back(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def agree_across_processes(results: dict[int, T | Ended], world: World) -> dict[int, T | Ended]:
    """The results, with an `Ended` in every process for a slot that ran out of memory in any."""
    if world.size > 1:  # all train one adapter, so its error ends the run
        raise_if_all_failed(results, len(results))
    agreed: dict[int, T | Ended] = {}
    for slot, result in results.items():
        lost = world.any(isinstance(result, Ended))
        elsewhere = lost and not isinstance(result, Ended)
        missing = Ended(MemoryError("memory ran out in another process"))
        agreed[slot] = missing if elsewhere else result
    return agreed


def raise_if_all_failed(
    results: Mapping[Any, T | Ended], num_residents: int, probe: Callable[[], Any] | None = None
) -> None:
    """Raise if all residents failed, other than by lack of memory: the process is the cause, not an adapter.

    Args:
        results: of the adapters that took part, by any key.
        num_residents: adapters that could have taken part.
        probe: called if all in `results` failed, but not all residents took part; computes something that
            needs no adapter, and raises if that fails as well.
    """
    ended = [result for result in results.values() if isinstance(result, Ended)]
    errors = [e.error for e in ended if not isinstance(e.error, MemoryError)]
    if not errors or len(errors) < len(results):
        return
    if len(errors) == num_residents:
        raise errors[0]
    if probe is not None:
        probe()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
