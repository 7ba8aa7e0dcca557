"""Run a whole sweep, the search and then the confirm stage, and fill its results folder."""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import optuna

from higgs_tune.base_source import check_pinned
from higgs_tune.cluster import Cluster, join_cluster, starts_own
from higgs_tune.config import SweepConfig
from higgs_tune.errors import ConfigError, HiggsTuneError, SweepError
from higgs_tune.sweep import runtime, space, study
from higgs_tune.sweep.confirm import unconfirmed
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import TUNE, disk_fault, open_folder, record_slots
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.nodes import idle_gpus, refuse_more_than_here
from higgs_tune.sweep.places import refuse_other_data, require_local
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import DEFAULT_LOOP
from higgs_tune.sweep.slots import resolve_slots, slots_of
from higgs_tune.sweep.storage import storage_faults
from higgs_tune.sweep.workers import Workers
from higgs_tune.train.signals import exit_on_sigterm, stop_signals

EXIT_RAY_DIED = 2  # as for any other error
EXIT_NOTHING_FEASIBLE = 3
GRACE_WITHOUT_RAY_S = 5.0  # enough for a sweep to end without Ray, if no call to it is pending


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    results: Path  # the folder with everything
    exit_code: int  # 0; 3 without a feasible full-budget trial; 130, 143, 129 when interrupted
    best_trial: str | None  # the best of the search; the confirm stage does not count
    num_trials: int  # of the search, as the study has them


def run_sweep(
    config: SweepConfig, *, resume: bool, command: list[str], loop_path: str = DEFAULT_LOOP
) -> SweepOutcome:
    """Run or resume a sweep and write all of its files except the report's.

    Args:
        resume: continue this sweep in its existing folder; a higher tune.num_trials extends it.
        command: what the user typed, for env.json.
        loop_path: `module:name` that builds a worker's training loop; tests pass a fake one.

    Raises:
        ConfigError: a setting is wrong, or the results folder or the study belongs to another sweep.
        SweepError: the results folder or the study cannot be written, or nothing trains.
        HiggsTuneError: the base or the data cannot be used.
    """
    check_pinned(config.base)
    space.check(config)
    if starts_own():  # a cluster's machines may have base and data where this one does not
        require_local(config)
        if resume:
            refuse_other_data(config)
    storage = config.tune.storage
    with storage_faults(storage):
        if storage is not None and not resume:
            study.refuse_taken(config.name, storage)
        with open_folder(config, resume=resume, command=command) as results:
            return _run(config, results, resume=resume, loop_path=loop_path)


def _run(config: SweepConfig, results: Path, *, resume: bool, loop_path: str) -> SweepOutcome:
    found = study.open_study(config.name, results, config.tune.storage)
    study.fail_stale(found)
    _refuse_unknown_trials(found, TrialFiles(results), results)
    if resume and _is_finished(found, config, TrialFiles(results)):
        return _outcome(results, found, Control())
    control = Control()
    display = Display()
    display.note(f"results {results}")
    try:
        log = runtime.tune_log(results / "tune.log")
        # Ray reports dead processes on standard output, where our table or JSON lines are.
        aside = redirect_stdout(sys.stderr)
        with (
            aside,
            log,
            join_cluster(runtime.ENVIRONMENT) as cluster,
            exit_on_sigterm(),
            _exit_if_ray_died(cluster, control, display, results),
        ):
            if cluster.is_own:
                refuse_more_than_here(config.tune)
            if (unused := idle_gpus(config.tune)) is not None:
                display.warn(unused)
            if config.tune.slots_per_worker == "auto":
                with stop_signals(control.request):
                    config = resolve_slots(config, control, display.warn)
                if control.stopping:
                    return _outcome(results, found, control)
                record_slots(results, config)
                display.note(f"{slots_of(config)} trials train together in each worker")
            workers = Workers(config, loop_path=loop_path)
            try:  # while the workers load
                from higgs_tune.sweep import search  # imports Tune and pandas: a second or two

                dashboard = cluster.complete()
                missing = "(it did not start)" if cluster.is_own else "(the cluster names none)"
                display.note(f"dashboard {f'http://{dashboard}' if dashboard else missing}")
                display.event("sweep_started", results=str(results), dashboard=dashboard)
                # Only now: until here a signal may end this process at once.
                inherited = runtime.inherited_environment() if cluster.is_own else nullcontext()
                with inherited, stop_signals(control.request):
                    search.run(config, results, workers, control, display, found)
            finally:
                workers.kill()
    except OSError as error:
        raise disk_fault(results) or error from None
    finally:
        display.close()
    if control.error is not None and control.request.number is None:
        raise control.error
    outcome = _outcome(results, found, control)
    shutil.rmtree(results / TUNE, ignore_errors=True)
    return outcome


@contextmanager
def _exit_if_ray_died(
    cluster: Cluster, control: Control, display: Display, results: Path
) -> Iterator[None]:
    """End the sweep if our own Ray has died; end this process if that takes too long.

    Ray dies alone, as when the system ends it to free memory, or by a signal that reaches all processes of
    a job. A call to a dead Ray would block for a minute and then end this process without a message.

    Raises:
        SweepError: what `yield` raised was because Ray had died.
    """
    is_over = threading.Event()
    kept = (
        f"What was recorded is kept: `higgs-tune report {results}` builds the report; to continue, repeat "
        f"the command with --resume --name {results.name}"
    )
    died = SweepError(f"Ray has ended on this machine, perhaps because memory ran out. {kept}")

    def watch() -> None:
        while not is_over.wait(1):
            if not cluster.has_died():
                continue
            control.fail(died)
            if is_over.wait(GRACE_WITHOUT_RAY_S):
                continue
            number = control.request.number
            line = (
                f"error: {died}"
                if number is None
                else f"interrupted, and Ray has ended, too. {kept}"
            )
            try:
                display.close()
                print(line, file=sys.stderr, flush=True)
            finally:  # printing fails if the reader of our output has ended, too
                os._exit(EXIT_RAY_DIED if number is None else 128 + number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except (
        Exception
    ) as error:  # re-raised, unless a signal ended Ray, too: that decides the exit code
        if isinstance(error, HiggsTuneError) or not cluster.has_died():
            raise
        if control.request.number is None:
            raise died from error
    finally:
        is_over.set()


def _refuse_unknown_trials(found: optuna.Study, files: TrialFiles, results: Path) -> None:
    """Raise ConfigError if the study lacks a trial of the folder, whose files a new one would continue."""
    known = study.latest(found)
    lost = [record.trial_id for record in files.records("t") if record.number not in known]
    if lost:
        raise ConfigError(
            f"{results}: the study {found.study_name} lacks {', '.join(lost[:3])}, found in trials/. It is "
            "not this sweep's, or is an older copy: in tune.storage, a relative path starts at the current "
            "folder. Put the study back, or give --name NAME for a new sweep."
        )


def _is_finished(found: optuna.Study, config: SweepConfig, files: TrialFiles) -> bool:
    """Whether a resumed sweep has nothing left to run or to record."""
    known = study.latest(found).values()
    search_over = len(known) >= config.tune.num_trials and not study.unfinished(found)
    # a trial's end gets into the study first
    recorded = all(files.ended(study.record_of(trial).trial_id) for trial in known)
    return search_over and recorded and not unconfirmed(found, config, files)


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
