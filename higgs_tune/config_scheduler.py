"""The scheduler's settings, which schedulers use each of them, and HyperBand's rungs."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from higgs_tune.config_space import Settings

ACTS_ON = {  # setting → schedulers
    "grace_fraction": ("asha", "median", "pbt"),
    "reduction_factor": ("asha", "hyperband"),
    "min_samples": ("median",),
    "perturb_every_steps": ("pbt",),
    "quantile_fraction": ("pbt",),
}


@dataclass(frozen=True)
class Rungs:
    """When the trials of a bracket are compared, and how many go on."""

    size: int  # trials at the start
    steps: tuple[int, ...]
    survivors: tuple[int, ...]


def hyperband(num_steps: int, unit_steps: int, factor: float) -> tuple[Rungs, ...]:
    """HyperBand's brackets, the one with the most and earliest cuts first.

    Args:
        unit_steps: every rung is a multiple of this.
        factor: the best 1/factor of a bracket's trials go on at each rung.

    Source: Li et al., Hyperband, JMLR 2018, algorithm 1, rounded as Tune's HyperBandScheduler does.
    """
    budget = max(1, num_steps // unit_steps)
    most_cuts = round(math.log(budget) / math.log(factor))
    brackets = []
    for num_cuts in range(most_cuts, -1, -1):
        rung = int(budget * factor**-num_cuts)
        if rung == 0:
            continue
        size = left = math.ceil((most_cuts + 1) / (num_cuts + 1) * factor**num_cuts)
        steps, survivors = [], []
        for _ in range(num_cuts):
            left = math.ceil(left / factor)
            steps.append(rung * unit_steps)
            survivors.append(left)
            rung = int(rung * factor)
        brackets.append(Rungs(size, tuple(steps), tuple(survivors)))
    return tuple(brackets)


class SchedulerSettings(Settings):
    """Which trials train on: early stopping, or a population that copies its best."""

    name: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    # asha, median: share of num_steps before the first stop; pbt: before the first copy
    grace_fraction: float = Field(default=0.34, gt=0, le=1)
    # asha, hyperband: the best 1/n at a rung go on
    reduction_factor: float = Field(default=3.0, gt=1)
    min_samples: int = Field(default=3, ge=1)  # median: that of at least so many other trials
    # pbt: copy and change every so many steps; default: as many as grace_fraction gives
    perturb_every_steps: int | None = Field(default=None, ge=1)
    # pbt: share of the population that copies, the worst, and that is copied, the best
    quantile_fraction: float = Field(default=0.25, gt=0, le=0.5)

    def refuse_impossible(
        self, num_sampled: int, num_steps: int, report_every_steps: int, past_warmup: int
    ) -> None:
        """Raise ValueError if hyperband never cuts, or pbt has too few trials or copies between reports.

        Args:
            num_sampled: trials beside the baselines.
        """
        if self.name == "hyperband" and not any(
            rungs.steps for rungs in hyperband(num_steps, past_warmup, self.reduction_factor)
        ):
            raise ValueError(
                "tune.scheduler.name is hyperband, which would stop no trial: the first report beyond "
                f"warm-up, at step {past_warmup}, is too late for a cut by {self.reduction_factor:g} within "
                f"train.num_steps ({num_steps}). Report more often (train.report_every_steps) or use asha"
            )
        if self.name != "pbt":
            return
        if num_sampled < 2:
            raise ValueError(
                f"tune.num_trials leaves {max(num_sampled, 0)} for a population beside the baselines, which "
                "never change: pbt needs two or more. Raise tune.num_trials"
            )
        every = self.perturb_every_steps
        if every is not None and every % report_every_steps:
            raise ValueError(
                f"tune.scheduler.perturb_every_steps ({every}) must be a multiple of "
                f"train.report_every_steps ({report_every_steps}): trials are compared "
                "where they are validated"
            )

    @model_validator(mode="after")
    def _acting(self) -> "SchedulerSettings":
        if self.name == "none":
            return self
        for name, field in SchedulerSettings.model_fields.items():
            acts = name == "name" or self.name in ACTS_ON[name]
            if not acts and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} has no effect with the scheduler {self.name}: leave it out, or keep its "
                    f"default ({field.default}). It acts with {', '.join(ACTS_ON[name])}"
                )
        if self.name == "hyperband" and self.reduction_factor < 2:
            raise ValueError(
                f"reduction_factor must be 2 or more with hyperband, found {self.reduction_factor:g}: "
                "the rungs of a bracket would coincide"
            )
        return self
