"""A trial's progress within the pack."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from higgs_tune.data.order import TrainOrder
from higgs_tune.train.interval import Interval
from higgs_tune.train.residents import Resident
from higgs_tune.train.room import Ended


@dataclass
class Run:
    """What the loop tracks of a resident, beyond the engine's state."""

    resident: Resident
    order: TrainOrder
    interval: Interval = field(default_factory=Interval)
    reported_done: bool = False
    ended: Ended | None = None  # set once it cannot train further

    @property
    def done(self) -> bool:
        """Whether its budget is used up."""
        return self.resident.step >= self.resident.config.num_steps

    @property
    def next_report(self) -> int:
        """The step of its next validation: the current one, if it is a report step not yet reported."""
        step, every = self.resident.step, self.resident.config.report_every_steps
        due = step if self.interval.num_steps and step % every == 0 else step - step % every + every
        return min(due, self.resident.config.num_steps)

    @property
    def due(self) -> bool:
        """Whether it must report at its current step, or cannot train further."""
        return self.ended is not None or self.next_report <= self.resident.step

    def outcome(self, figures: Mapping[str, Any], has_finite_gradients: bool) -> dict[str, str]:
        """The "status" after a validation, and the "reason" for it."""
        bad = [n for n, v in figures.items() if n.startswith("val/") and not math.isfinite(v)]
        if self.ended is not None:
            return {"status": self.ended.status, "reason": self.ended.reason}
        if not has_finite_gradients:
            return {"status": "diverged", "reason": "a gradient was not finite"}
        if bad:
            return {"status": "diverged", "reason": f"{bad[0]} is not finite"}
        return {"status": "completed" if self.done else "running", "reason": ""}
