"""The confirm stage: the best few and the baseline again, at full budget, with fresh seeds."""

from collections.abc import Sequence

import optuna

from higgs_tune.config import SweepConfig
from higgs_tune.sweep import space, study
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.study import TrialRecord


def confirm_records(
    found: optuna.Study, config: SweepConfig, existing: Sequence[TrialRecord]
) -> list[TrialRecord]:
    """Full-budget repeats of trial 0 and of the best other feasible trials, seed by seed.

    They run even if trial 0 leads the search: one run of each does not show that nothing beats it.
    Every configuration gets the same seeds, so that differences from the baseline are paired.
    After a sweep was extended, other trials may be the best: repeats that exist keep their ids, and
    new ones get the next numbers. The list is empty if there is nothing to confirm.
    """
    num_configs = config.confirm.num_configs
    best = study.best_records(found, num_configs + 1)
    if not best or not num_configs:
        return []
    baseline = study.record_of(study.latest(found)[0])
    others = [record for record in best if record.number != 0]
    repeated = [baseline, *others[:num_configs]]
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
    """Optimizer steps of the stage, if enough trials are feasible."""
    confirm = config.confirm
    num_runs = (confirm.num_configs + 1) * confirm.num_seeds if confirm.num_configs else 0
    return num_runs * config.train.num_steps


def unconfirmed(found: optuna.Study, config: SweepConfig, files: TrialFiles) -> list[TrialRecord]:
    """The confirm trials that have not ended yet."""
    records = confirm_records(found, config, files.records("c"))
    return [record for record in records if files.ended(record.trial_id) is None]
