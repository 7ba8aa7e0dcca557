"""The search and then the confirm stage, under Ray Tune."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray.tune.schedulers import FIFOScheduler

from higgs_tune.config import SweepConfig
from higgs_tune.sweep import study
from higgs_tune.sweep.confirm import most_steps, unconfirmed
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.scheduler import make_scheduler, replay
from higgs_tune.sweep.searcher import StudySearcher
from higgs_tune.sweep.source import TrialSource
from higgs_tune.sweep.stages import Sweep
from higgs_tune.sweep.study import TrialRecord
from higgs_tune.sweep.workers import Workers


class ConfirmSource(TrialSource):
    """Hands out a fixed list of trials and tells the study nothing."""

    def __init__(self, records: Sequence[TrialRecord], **source: Any) -> None:
        super().__init__(**source)
        self._records = list(records)

    def num_to_come(self) -> int:
        """How many trials of the list are left."""
        return len(self._records)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial's config for Tune; None if none may start now, FINISHED at the end."""
        if self.over():
            return self.nothing()
        if self.is_full():
            return None
        record = self._records.pop(0)
        return self._seat(trial_id, record, None, self._checkpoint_of(record.trial_id))


def run(
    config: SweepConfig,
    results: Path,
    workers: Workers,
    control: Control,
    display: Display,
    found: optuna.Study,
) -> None:
    """Run what is left of both stages, unless something ends the sweep."""
    sweep = Sweep(config, results, workers, control, display)
    _search(sweep, found)
    if not control.stopping:
        _confirm(sweep, found)
    sweep.finish()


def _search(sweep: Sweep, found: optuna.Study) -> None:
    """Restore scheduler and files from an earlier run's study, then run what is left of the search."""
    unfinished = study.unfinished(found)
    records = [study.record_of(trial) for trial in unfinished]
    for record in records:
        sweep.files.mend_copy(record)
    scheduler = make_scheduler(sweep.config, steps_behind(records, sweep.files.checkpoint_of))
    waiting = {trial.number for trial in unfinished}
    for index, trial in study.latest(found).items():
        if trial.number in waiting:
            continue
        replay(scheduler, f"earlier-{index}", trial, ended=True)
        record = study.record_of(trial)
        if sweep.files.status(record.trial_id) is None:  # killed before the file was written
            status, reason = (trial.user_attrs[key] for key in (study.STATUS, study.REASON))
            is_feasible = study.feasible(trial) if trial.constraints else None
            sweep.files.end(record.trial_id, status, reason, is_feasible)
    time_limit_s = sweep.config.tune.time_limit_s
    source = StudySearcher(
        found,
        sweep.config,
        audio_limit=sweep.audio_limit,
        on_resume=lambda tune_id, trial: replay(scheduler, tune_id, trial, ended=False),
        on_copy=sweep.copied,
        on_study_error=sweep.fail_study,
        deadline=None if time_limit_s is None else time.monotonic() + time_limit_s,
        **sweep.source_settings(),
    )
    sweep.show_earlier()
    if source.num_to_come():
        sweep.run("search", source, scheduler, steps_after=most_steps(sweep.config))


def steps_behind(
    records: Sequence[TrialRecord], checkpoint_of: Callable[[str], tuple[Path, int] | None]
) -> list[int]:
    """The steps from which sampled trials continue; baselines belong to no population and run ahead."""
    searched = [record.trial_id for record in records if record.origin == "search"]
    return [known[1] for known in map(checkpoint_of, searched) if known]


def _confirm(sweep: Sweep, found: optuna.Study) -> None:
    """Run the confirm trials that have not ended yet."""
    records = unconfirmed(found, sweep.config, sweep.files)
    source = ConfirmSource(records, **sweep.source_settings())
    if records:
        sweep.run("confirm", source, FIFOScheduler())
