"""Where a worker's time goes, from its pack's first step to its last.

A slot is refilled in the time from when its trial left it until the next sits in it, as far as there
was one that could have: whatever its neighbours did meanwhile.
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
    """Adds up seconds by kind; time after the last step counts once another step is done."""

    def __init__(self) -> None:
        self._counted = dict.fromkeys(KINDS, 0.0)
        self._tail = dict.fromkeys(KINDS, 0.0)
        self._busy_slot_s = 0.0
        self._wanted_slot_s = self._wanted_tail_s = 0.0
        self._started = False
        self._freed: list[float] = []  # `_lacking_s` when each free slot lost its trial
        self._refills: list[float] = []
        self._lacking_s = 0.0  # time in which a trial could have filled a slot that had none

    def add(self, seconds: dict[str, float], *, busy: int, wanted: int) -> None:
        """A stretch of time in which the same trials sat in the pack.

        Args:
            seconds: by kind; with `train_s` if the pack trained.
            busy: slots with a trial in them that has not been stopped.
            wanted: slots that the trials there, or to come, could have filled.
        """
        has_trained = "train_s" in seconds
        self._started |= has_trained
        if not self._started:
            return
        total = sum(seconds.values())
        for kind, spent in seconds.items():
            self._tail[kind] += spent
        if "idle_s" in seconds:  # nobody waits for what is free now
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
        """So many slots have lost their trials."""
        self._freed += [self._lacking_s] * num_slots

    def filled(self, num_slots: int) -> None:
        """So many slots have trials again, or for the first time."""
        for since in self._freed[:num_slots]:
            self._refills.append(self._lacking_s - since)
        del self._freed[:num_slots]

    def figures(self) -> dict[str, Any]:
        """What `workers.json` says of a worker."""
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
