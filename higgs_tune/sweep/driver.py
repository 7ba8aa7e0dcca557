"""Runs a whole sweep, the search and then the confirm stage, and fills its results folder."""

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
from higgs_tune.sweep import runtime, space, study
from higgs_tune.sweep.confirm import unconfirmed
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import TUNE, disk_fault, open_folder, record_slots
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.nodes import idle_gpus, refuse_more_than_here
from higgs_tune.sweep.places import refuse_absent, refuse_other_data
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import DEFAULT_LOOP
from higgs_tune.sweep.slots import resolve_slots, slots_of
from higgs_tune.sweep.storage import storage_faults
from higgs_tune.sweep.workers import Workers
from higgs_tune.train.signals import exit_on_sigterm, stop_signals

EXIT_NOTHING_FEASIBLE = 3
RAY_IS_DEAD_S = 5.0  # what a sweep's end takes without it, if nothing asks it


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
    if resume and _is_finished(found, config, TrialFiles(results)):
        return _outcome(results, found, Control())
    control = Control()
    display = Display()
    display.note(f"results {results}")
    try:
        log = runtime.tune_log(results / "tune.log")
        # Ray prints that a process has died on standard output, where our table or JSON lines are.
        aside = redirect_stdout(sys.stderr)
        with (
            aside,
            log,
            join_cluster(runtime.ENVIRONMENT) as cluster,
            exit_on_sigterm(),
            _end_with_ray(cluster, control, display, results),
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
                missing = "(it did not start)" if cluster.is_own else "(of the cluster)"
                display.note(f"dashboard {f'http://{dashboard}' if dashboard else missing}")
                display.event("sweep_started", results=str(results), dashboard=dashboard)
                # From here on; before, nothing needs an orderly end.
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
def _end_with_ray(
    cluster: Cluster, control: Control, display: Display, results: Path
) -> Iterator[None]:
    """End this process if Ray has ended: a job's end may be told to all of its processes at once.

    A call to such a Ray would last for a minute, after which it ends the process without a word.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(1):
            number = control.request.number
            if number is None or not cluster.has_died() or is_over.wait(RAY_IS_DEAD_S):
                continue
            try:
                display.close()
                print(
                    f"interrupted, and Ray with it. What was recorded is kept: `higgs-tune report {results}` "
                    f"builds the report, the same command with --resume --name {results.name} goes on",
                    file=sys.stderr,
                    flush=True,
                )
            finally:  # whoever read that may have been ended, too
                os._exit(128 + number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()


def _is_finished(found: optuna.Study, config: SweepConfig, files: TrialFiles) -> bool:
    """Whether a resumed sweep has nothing left to run."""
    num_known = len(study.latest(found))
    search_over = num_known >= config.tune.num_trials and not study.unfinished(found)
    return search_over and not unconfirmed(found, config, files)


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
