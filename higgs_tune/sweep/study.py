"""The Optuna study of a sweep: its storage, its records, and what a resumed sweep finds in it."""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from higgs_tune.config import TrialConfig
from higgs_tune.errors import ConfigError
from higgs_tune.metrics import STEP
from higgs_tune.sweep.space import same_but_seed
from higgs_tune.sweep.storage import open_storage

JOURNAL = "study.journal"
STALE = "the process that ran it ended before it could record how the trial ended"

# User attributes of a trial in the study.
INDEX = "index"  # number within the sweep; a resumed trial keeps it
RECORD = "record"  # JSON of a TrialRecord
STATUS = "status"
REASON = "reason"
DUPLICATE_OF = "duplicate_of"

BROKE = "broke"  # a constraint that a trial violates by ending with a status in metrics.BROKEN


@dataclass(frozen=True)
class TrialRecord:
    """A trial's identity and configuration, known from its suggestion on."""

    trial_id: str
    number: int
    name: str
    origin: str  # baseline, baseline_fixed, search or confirm
    confirms: str | None
    config: TrialConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "config": self.config.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "TrialRecord":
        """The inverse of `to_dict`."""
        return cls(**{**raw, "config": TrialConfig.model_validate(raw["config"])})


def open_study(name: str, folder: Path, storage_url: str | None) -> optuna.Study:
    """Load or create the study, in a journal in `folder` unless a storage URL is given.

    Raises:
        ConfigError: the database at the URL cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    storage: BaseStorage
    if storage_url is None:
        path = folder / JOURNAL
        drop_torn_line(path)
        # Only one process uses the journal, so a lock older than this is a killed process's.
        lock = JournalFileOpenLock(str(path), grace_period=5)
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    else:
        storage = open_storage(storage_url)
    return optuna.create_study(
        study_name=name, storage=storage, direction="minimize", load_if_exists=True
    )


def refuse_taken(name: str, storage_url: str) -> None:
    """Raise ConfigError if the storage holds a study of that name, which a new sweep must not use."""
    if name in optuna.get_all_study_names(open_storage(storage_url)):
        raise ConfigError(
            f"tune.storage already holds a study named {name}. Give --resume to go on with its sweep, "
            "or --name NAME for a new one."
        )


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process or a full disk left unfinished."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            logging.getLogger(__name__).warning("%s: dropped an unfinished last line", path)
            file.truncate(content.rfind(b"\n") + 1)


def record_of(trial: FrozenTrial) -> TrialRecord:
    """The record that the searcher stored in a study entry that `latest` returns."""
    return _parsed(trial.user_attrs[RECORD])


@cache
def _parsed(record: str) -> TrialRecord:
    """A parsed record; cached, because each proposal reads the records of all earlier trials."""
    return TrialRecord.from_dict(json.loads(record))


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The newest study entry of each trial of the sweep, by its index; duplicates are left out."""
    newest: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        index = trial.user_attrs.get(INDEX)
        if index is not None:
            newest[index] = trial
    return dict(sorted(newest.items()))


def fail_stale(study: optuna.Study) -> None:
    """Fail the RUNNING and WAITING entries that an earlier process left; they repel the sampler."""
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()  # makes one RUNNING: `tell` takes no other state, `ask` takes WAITING ones first
    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        trial = optuna.Trial(study, frozen._trial_id)
        trial.set_user_attr(STATUS, "cancelled")
        trial.set_user_attr(REASON, STALE)
        study.tell(trial, state=TrialState.FAIL)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """The cancelled trials, which a resumed sweep continues."""
    newest = latest(study).values()
    return [trial for trial in newest if trial.user_attrs.get(STATUS) == "cancelled"]


def feasible(trial: FrozenTrial) -> bool:
    """Whether all recorded constraints hold; false for a trial without any."""
    return bool(trial.constraints) and all(value <= 0 for value in trial.constraints.values())


def best_records(study: optuna.Study, num_records: int) -> list[TrialRecord]:
    """The best feasible full-budget trials, one per configuration, the best first.

    Once the space is exhausted, configurations run again with other seeds.
    """
    done = [
        trial
        for trial in latest(study).values()
        if trial.state == TrialState.COMPLETE and feasible(trial)
    ]
    best: list[TrialRecord] = []
    for trial in sorted(done, key=lambda trial: trial.values[0]):
        record = record_of(trial)
        if not any(same_but_seed(record.config, b.config) for b in best):
            best.append(record)
    return best[:num_records]


def ending(result: Mapping[str, Any]) -> tuple[str, str | None]:
    """The status and reason to record for a trial that Tune ended after `result`."""
    status = result.get("status")
    if status is None:
        return "cancelled", "stopped before its first result"
    if status == "running":
        return "pruned", f"stopped by the scheduler at step {result.get(STEP)}"
    return status, result.get("reason") or None
