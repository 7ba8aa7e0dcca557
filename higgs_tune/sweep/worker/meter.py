"""Where a worker's time goes, from its pack's first step to its last.

The time to refill a slot runs from its trial's departure until the next trial is in it, but only while
there is a trial that could fill it. What the neighbours do meanwhile does not matter.
"""

from statistics import median
from typing import Any

KINDS: tuple[str, ...] = (
    "train_s",
    "prepare_s",
    "validate_s",
    "save_s",
    "join_s",
    "wait_s",
    "idle_s",
    "other_s",
)


class Meter:
    """Adds up seconds by kind; time after the latest step counts only once another step is done."""

    def __init__(self) -> None:
        self._counted = dict.fromkeys(KINDS, 0.0)
        self._tail = dict.fromkeys(KINDS, 0.0)
        self._busy_slot_s = 0.0
        self._wanted_slot_s = self._wanted_tail_s = 0.0
        self._started = False
        self._freed: list[float] = []  # `_lacking_s` when each free slot lost its trial
        self._refills: list[float] = []
        self._lacking_s = 0.0  # time in which a trial could have filled an empty slot

    def add(self, seconds: dict[str, float], *, busy: int, wanted: int) -> None:
        """Add a stretch of time in which the same trials were in the pack.

        Args:
            seconds: by kind; with `train_s` if the pack trained.
            busy: slots that hold a trial which has not been stopped.
            wanted: slots that the trials present or to come could have filled.
        """
        has_trained = "train_s" in seconds
        self._started |= has_trained
        if not self._started:
            return
        total = sum(seconds.values())
        for kind, spent in seconds.items():
            self._tail[kind] += spent
        if "idle_s" in seconds:  # no trial wants the slots that are free now
            self._freed.clear()
        else:
            self._lacking_s += total if wanted > busy else 0.0
            self._wanted_tail_s += wanted * total
        if has_trained:
            self._busy_slot_s += busy * total
            self._wanted_slot_s += self._wanted_tail_s
            self._wanted_tail_s = 0.0
            for kind in KINDS:
                self._counted[kind] += self._tail[kind]
                self._tail[kind] = 0.0

    def freed(self, num_slots: int) -> None:
        """Note that so many slots have become empty."""
        self._freed += [self._lacking_s] * num_slots

    def filled(self, num_slots: int) -> None:
        """Note that so many slots have been filled, again or for the first time."""
        for since in self._freed[:num_slots]:
            self._refills.append(self._lacking_s - since)
        del self._freed[:num_slots]

    def figures(self) -> dict[str, Any]:
        """The worker's entry in `workers.json`."""
        spent = {kind: round(seconds, 3) for kind, seconds in self._counted.items()}
        occupancy = self._busy_slot_s / self._wanted_slot_s if self._wanted_slot_s else None
        return {
            "wall_s": round(sum(self._counted.values()), 3),
            **spent,
            "busy_slot_s": round(self._busy_slot_s, 3),
            "wanted_slot_s": round(self._wanted_slot_s, 3),
            "occupancy": None if occupancy is None else round(occupancy, 4),
            "num_refills": len(self._refills),
            "refill_median_s": round(median(self._refills), 4) if self._refills else None,
            "refill_max_s": round(max(self._refills), 4) if self._refills else None,
        }
