"""Runs a whole sweep, the search and then the confirm stage, and fills its results folder."""

import shutil
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import optuna
from ray.tune.schedulers import FIFOScheduler

from higgs_tune.base_source import check_pinned
from higgs_tune.cluster import join_cluster, starts_own
from higgs_tune.config import SweepConfig
from higgs_tune.sweep import runtime, space, study
from higgs_tune.sweep.confirm import ConfirmSource, confirm_records, most_steps
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import disk_fault, open_folder, record_slots
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.nodes import idle_gpus, refuse_more_than_here
from higgs_tune.sweep.places import refuse_absent
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.scheduler import make_scheduler, replay
from higgs_tune.sweep.searcher import StudySearcher
from higgs_tune.sweep.seats import DEFAULT_LOOP
from higgs_tune.sweep.slots import resolve_slots, slots_of
from higgs_tune.sweep.stages import Sweep
from higgs_tune.sweep.storage import storage_faults
from higgs_tune.sweep.study import TrialRecord
from higgs_tune.sweep.workers import Workers
from higgs_tune.train.signals import stop_signals

EXIT_NOTHING_FEASIBLE = 3


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    results: Path  # the folder with everything
    exit_code: int  # 0; 3 without a feasible full-budget trial; 130, 143, 129 when interrupted
    best_trial: str | None  # the best of the search, not yet of the confirm stage
    num_trials: int  # of the search, by what the study holds


def run_sweep(
    config: SweepConfig, *, resume: bool, command: list[str], loop_path: str = DEFAULT_LOOP
) -> SweepOutcome:
    """Run a sweep, or go on with one, and write every file of it but the report's.

    Args:
        resume: go on in a folder that holds this sweep; more tune.num_trials extend it.
        command: what the user typed, for env.json.
        loop_path: `module:name` of what a worker builds; tests put a fake one here.

    Raises:
        ConfigError: a setting, or a results folder or a study that belongs to another sweep.
        SweepError: the results folder or the study cannot be written, or nothing trains.
        HiggsTuneError: the base or the data cannot be used.
    """
    check_pinned(config.base)
    space.check(config)
    if starts_own():  # the machines of a cluster may have what this one has not
        refuse_absent(config)
    storage = config.tune.storage
    with storage_faults(storage):
        if storage is not None and not resume:
            study.refuse_taken(config.name, storage)
        with open_folder(config, resume=resume, command=command) as results:
            return _run(config, results, resume=resume, loop_path=loop_path)


def _run(config: SweepConfig, results: Path, *, resume: bool, loop_path: str) -> SweepOutcome:
    found = study.open_study(config.name, results, config.tune.storage)
    study.fail_stale(found)
    if resume and _is_finished(found, config, TrialFiles(results)):
        return _outcome(results, found, Control())
    control = Control()
    display = Display()
    try:
        log = runtime.tune_log(results / "tune.log")
        # Ray prints that a process has died on standard output, where our table or JSON lines are.
        aside = redirect_stdout(sys.stderr)
        # Once Ray has started, which sets a handler of its own; until then nothing needs an orderly end.
        signals = stop_signals(control.request)
        with (
            aside,
            log,
            join_cluster(runtime.ENVIRONMENT) as cluster,
            signals,
            runtime.inherited_environment() if cluster.is_own else nullcontext(),
        ):
            display.note(f"results {results}   dashboard {cluster.dashboard or '(of the cluster)'}")
            display.event("sweep_started", results=str(results), dashboard=cluster.dashboard)
            if cluster.is_own:
                refuse_more_than_here(config.tune)
            if (unused := idle_gpus(config.tune)) is not None:
                display.warn(unused)
            if config.tune.slots_per_worker == "auto":
                config = resolve_slots(config, control, display.warn)
                if control.stopping:
                    return _outcome(results, found, control)
                record_slots(results, config)
                display.note(f"{slots_of(config)} trials train together in each worker")
            workers = Workers(config, loop_path=loop_path)
            try:
                sweep = Sweep(config, results, workers, control, display)
                _search(sweep, found)
                if not control.stopping:
                    _confirm(sweep, found)
                sweep.finish()
            finally:
                workers.kill()
    except OSError as error:
        raise disk_fault(results) or error from None
    finally:
        display.close()
    if control.error is not None and control.request.number is None:
        raise control.error
    outcome = _outcome(results, found, control)
    shutil.rmtree(results / "ray", ignore_errors=True)
    return outcome


def _search(sweep: Sweep, found: optuna.Study) -> None:
    """Reconcile the study with an earlier run, then run what is missing of the search."""
    unfinished = study.unfinished(found)
    records = [study.record_of(trial) for trial in unfinished]
    for record in records:
        sweep.files.mend_copy(record)
    checkpoints = [sweep.files.checkpoint_of(record.trial_id) for record in records]
    scheduler = make_scheduler(sweep.config, [known[1] for known in checkpoints if known])
    waiting = {trial.number for trial in unfinished}
    for index, trial in study.latest(found).items():
        if trial.number in waiting:
            continue
        replay(scheduler, f"earlier-{index}", trial, ended=True)
        record = study.record_of(trial)
        if sweep.files.status(record.trial_id) is None:  # killed between the study and the file
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


def _confirm(sweep: Sweep, found: optuna.Study) -> None:
    """Run the confirm trials that have not ended yet."""
    records = _unconfirmed(found, sweep.config, sweep.files)
    source = ConfirmSource(records, **sweep.source_settings())
    if records:
        sweep.run("confirm", source, FIFOScheduler())


def _unconfirmed(found: optuna.Study, config: SweepConfig, files: TrialFiles) -> list[TrialRecord]:
    """The confirm trials that have not come to their end."""
    records = confirm_records(found, config, files.records("c"))
    return [record for record in records if files.ended(record.trial_id) is None]


def _is_finished(found: optuna.Study, config: SweepConfig, files: TrialFiles) -> bool:
    """Whether a resumed sweep has nothing left to run."""
    num_known = len(study.latest(found))
    search_over = num_known >= config.tune.num_trials and not study.unfinished(found)
    return search_over and not _unconfirmed(found, config, files)


def _outcome(results: Path, found: optuna.Study, control: Control) -> SweepOutcome:
    best = study.best_records(found, 1)
    exit_code = 0 if best else EXIT_NOTHING_FEASIBLE
    if control.request.number is not None:
        exit_code = 128 + control.request.number
    return SweepOutcome(
        results=results,
        exit_code=exit_code,
        best_trial=best[0].trial_id if best else None,
        num_trials=len(study.latest(found)),
    )
