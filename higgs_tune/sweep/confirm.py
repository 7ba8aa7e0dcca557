"""The confirm stage: the best few and the baseline again, at full budget, with fresh seeds."""

from collections.abc import Sequence
from typing import Any

import optuna

from higgs_tune.config import SweepConfig
from higgs_tune.sweep import space, study
from higgs_tune.sweep.source import TrialSource
from higgs_tune.sweep.study import TrialRecord


def confirm_records(
    found: optuna.Study, config: SweepConfig, existing: Sequence[TrialRecord]
) -> list[TrialRecord]:
    """Full-budget repeats of the best feasible trials and of trial 0, seed by seed.

    Every configuration gets the same seeds, so that differences to the baseline are paired.
    A sweep that was extended may find others to be the best: repeats that exist keep their ids, the
    new ones get the next numbers. Nothing to confirm, nothing to run: an empty list.
    """
    best = study.best_records(found, config.confirm.num_configs)
    if not best:
        return []
    baseline = study.record_of(study.latest(found)[0])
    repeated = [baseline, *(record for record in best if record.number != 0)]
    seeds = [
        space.trial_seed(config.tune.seed, "confirm", index)
        for index in range(config.confirm.num_seeds)
    ]
    known = {(record.confirms, record.config.seed): record for record in existing}
    number = max((record.number for record in existing), default=-1)
    records = []
    for seed in seeds:
        for original in repeated:
            if (original.trial_id, seed) in known:
                records.append(known[original.trial_id, seed])
                continue
            number += 1
            name = f"c{number:03d}"
            trial = original.config.model_copy(update={"seed": seed})
            title = f"{space.short_name(name, trial)} confirms {original.trial_id}"
            records.append(TrialRecord(name, number, title, "confirm", original.trial_id, trial))
    return records


def most_steps(config: SweepConfig) -> int:
    """Optimizer steps of the stage, if trial 0 is not among the best."""
    confirm = config.confirm
    num_runs = (confirm.num_configs + 1) * confirm.num_seeds if confirm.num_configs else 0
    return num_runs * config.train.num_steps


class ConfirmSource(TrialSource):
    """Hands out a fixed list; nothing is told to the study."""

    def __init__(self, records: Sequence[TrialRecord], **source: Any) -> None:
        super().__init__(**source)
        self._records = list(records)

    def num_to_come(self) -> int:
        """What is left of the list."""
        return len(self._records)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next of the list; None while there is none, or FINISHED."""
        if self.over():
            return self.nothing()
        if self.is_full():
            return None
        record = self._records.pop(0)
        return self._seat(trial_id, record, None, self._checkpoint_of(record.trial_id))
