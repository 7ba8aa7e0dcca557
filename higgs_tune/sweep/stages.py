"""What the search and the confirm stage share: one Tuner over the sweep's workers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError
from ray.tune import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    Stopper,
    TuneConfig,
    Tuner,
)
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from higgs_tune.config import SweepConfig
from higgs_tune.config_steps import num_checkpoints
from higgs_tune.errors import ConfigError, HiggsTuneError, SweepError
from higgs_tune.files import write_json
from higgs_tune.metrics import VAL_AUDIO_NLL, base_difference
from higgs_tune.sweep.boards import Boards
from higgs_tune.sweep.callback import SweepCallback
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import BASE, TUNE, disk_error, disk_fault
from higgs_tune.sweep.later import Later
from higgs_tune.sweep.live import Display
from higgs_tune.sweep.records import TrialFiles, read_json
from higgs_tune.sweep.seats import num_seats
from higgs_tune.sweep.slots import slots_of
from higgs_tune.sweep.source import TrialSource
from higgs_tune.sweep.space import distributions
from higgs_tune.sweep.storage import storage_error
from higgs_tune.sweep.study import TrialRecord
from higgs_tune.sweep.trainable import PackTrial
from higgs_tune.sweep.workers import Workers

WORKERS_LOG = "workers.log"


class _Stop(Stopper):
    """Tells Tune whether to stop the sweep."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """False: this never stops a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether the whole sweep must stop."""
        return self._control.stopping

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this only for Tuner.restore, which is never used here."""
        return {}


class Sweep:
    """What the two stages of one run of a sweep share."""

    def __init__(
        self,
        config: SweepConfig,
        results: Path,
        workers: Workers,
        control: Control,
        display: Display,
    ) -> None:
        self.config = config
        self.results = results
        self.files, self._later = TrialFiles(results), Later()
        self._boards = Boards(results, distributions(config))
        self._workers = workers
        self._control = control
        self._display = display
        display.board.num_slots = config.tune.num_workers * slots_of(config)
        self._base = read_json(results / BASE)  # of this or an earlier run
        self._base_from = str(results / BASE)  # its origin, for messages

    def audio_limit(self) -> float:
        """The highest val/audio/nll_per_code that is still feasible."""
        assert self._base is not None  # no worker trains before its base was accepted
        start: float = self._base["metrics"][VAL_AUDIO_NLL]
        return start * (1 + self.config.objective.audio_tolerance)

    def check_workers(self) -> None:
        """Handle the workers' answers, and write workers.json from time to time."""
        self.hear_workers()
        self.write_figures(self._workers.poll_figures())

    def hear_workers(self) -> None:
        """Handle the workers' answers so far.

        Raises:
            HiggsTuneError: a worker cannot be used.
        """
        self._workers.hear(self._accept, self._warned, self._display.warn, self._begun)

    def finish(self) -> None:
        """Write the workers' last figures and warnings."""
        self.write_figures(self._workers.last_figures())
        try:
            self.hear_workers()
        except HiggsTuneError as error:
            self._control.fail(error)

    def write_figures(self, figures: dict[str, dict[str, Any]] | None) -> None:
        """Write workers.json, where the workers' time went, if there are figures."""
        if figures:
            write_json(self.results / "workers.json", figures)

    def _accept(self, worker: str, description: dict[str, Any]) -> None:
        """Refuse a worker whose base or data differ from base.json, which the first worker fills."""
        node = description.pop("node")
        if self._base is None:
            write_json(self.results / BASE, description)
            self._base, self._base_from = description, f"{worker} on node {node}"
        found = difference(self._base, description)
        if found is not None:
            raise ConfigError(
                f"{worker} on node {node}: {found} (as in {self._base_from}). All losses of a sweep "
                "must be measured on the same base and data: put the same ones on that node, or "
                "start another sweep with --name NAME."
            )
        metrics = self._display.board.base = description["metrics"]
        self._display.event("base_loaded", worker=worker, node=node, metrics=metrics)

    def _warned(self, worker: str, texts: list[str]) -> None:
        with (self.results / WORKERS_LOG).open("a", encoding="utf-8") as file:
            file.writelines(f"{worker} {text}\n" for text in texts)
        for text in texts:
            self._display.warn(f"{worker} {text}")

    def _begun(self, worker: str) -> None:
        self._display.board.begin()
        self._display.event("training", worker=worker)

    def copied(self, record: TrialRecord, donor_id: str) -> None:
        """Record that a trial of a population took over another's weights."""
        for trial_id in (donor_id, record.trial_id):
            self._later.wait(trial_id)
        self.files.copied(record, donor_id)
        change = record.config.schedule[-1].model_dump()
        self._display.event("trial_copied", trial=record.trial_id, **change)

    def source_settings(self) -> dict[str, Any]:
        """Arguments that both trial sources need."""
        return {
            "workers": self._workers.names,
            "publish": self._workers.publish,
            "serving": self._workers.serving,
            "rooms": self._workers.rooms,
            "checkpoint_of": self.files.checkpoint_of,
        }

    def show_earlier(self) -> None:
        """Show the trials that ended in an earlier run of the sweep."""
        if self._base is not None:
            self._display.board.base = self._base["metrics"]
        for record in self.files.records(""):
            if (end := self.files.ended(record.trial_id)) is not None:
                last = self.files.last(record.trial_id)
                self._display.board.known(record, end["status"], last, end["feasible"])

    def run(
        self, stage: str, source: TrialSource, scheduler: TrialScheduler, steps_after: int = 0
    ) -> None:
        """Run one Tuner from its first trial to its last.

        Args:
            steps_after: optimizer steps that the next stage may take, to estimate the time left.
        """
        self._workers.begin_stage()
        self._display.board.stage, self._display.board.steps_after = stage, steps_after
        self._display.event("stage", stage=stage, trials=source.num_to_come())
        tune = self.config.tune
        callback = SweepCallback(
            results=self.results,
            files=self.files,
            boards=self._boards,
            later=self._later,
            source=source,
            control=self._control,
            display=self._display,
            num_checkpoints=num_checkpoints(self.config) if stage == "search" else 1,
            audio_limit=self.audio_limit,
            check_workers=self.check_workers,
            close_workers=self._workers.close,
        )
        tuner = Tuner(
            PackTrial,
            tune_config=TuneConfig(
                search_alg=source,
                scheduler=scheduler,
                num_samples=-1,  # the source says when there are no more
                max_concurrent_trials=tune.num_workers
                * num_seats(slots_of(self.config), strict=tune.num_workers == 1),
                reuse_actors=True,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=RunConfig(
                name=stage,
                storage_path=str(self.results / TUNE),
                stop=_Stop(self._control),
                callbacks=[callback],
                failure_config=FailureConfig(max_failures=tune.max_failures),
                # no num_to_keep, with which Tune writes the state of all trials at every checkpoint
                # of one: the callback removes old ones
                checkpoint_config=CheckpointConfig(checkpoint_frequency=1),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except (OSError, TuneError):  # Tune writes below the results folder, too
            fault = disk_fault(self.results)
            if fault is not None:
                self._control.fail(fault)
            if not self._control.stopping:
                raise
        except RuntimeError as error:  # Tune's, if Ray ended a trial's process to free memory
            if not isinstance(error.__cause__, OutOfMemoryError):
                raise
            self._control.fail(
                SweepError(
                    "a machine's memory ran out, and Ray ended a trial's process there. What was "
                    "recorded is kept. End other programs or use a machine with more memory; then "
                    f"start again with --resume. Ray says: {error.__cause__}"
                )
            )
            callback.cancel()
        try:
            self._later.finish()
            self._boards.finish()
        except OSError as error:
            self._control.fail(disk_error(self.results, error))

    def fail_study(self, error: Exception) -> None:
        """End the sweep because its study cannot be written."""
        if isinstance(error, OSError):  # the journal, in the results folder
            self._control.fail(disk_error(self.results, error))
        else:
            self._control.fail(storage_error(self.config.tune.storage, error))


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """How a worker's base or data differ from the expected ones, in words; None if they do not."""
    name = "content_hash"
    if expected[name] != found[name]:
        return f"its dataset has {name} {found[name]}, needed {expected[name]}"
    return base_difference(expected["metrics"], found["metrics"])


def _trial_id(trial: Trial) -> str:
    return trial.config["id"]
