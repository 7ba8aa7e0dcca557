"""The adapters of a pack: how large they may be, what resuming one needs, which hold a slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from higgs_tune.config import TargetPath, TrialConfig


@dataclass(frozen=True)
class PackLimits:
    """What the slots of an engine must be able to hold."""

    num_slots: int
    max_rank: int
    paths: frozenset[TargetPath]  # union over all trials

    @classmethod
    def of(cls, configs: Sequence[TrialConfig], num_slots: int) -> "PackLimits":
        """The smallest limits that hold these trials; without trials, limits for the base alone."""
        return cls(
            num_slots=num_slots,
            max_rank=max((config.rank for config in configs), default=1),
            paths=frozenset(path for config in configs for path in config.targets),
        )


@dataclass(eq=False)
class AdapterState:
    """All that resuming an adapter's training needs: plain CPU tensors by full parameter name.

    The moments may be empty once the adapter has used up its budget.
    """

    step: int
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


@dataclass
class Resident:
    """An adapter that holds a slot."""

    trial_id: str
    slot: int
    config: TrialConfig
    account: dict[str, Any]
    step: int = 0
    num_forwards: int = 0  # of the current step
