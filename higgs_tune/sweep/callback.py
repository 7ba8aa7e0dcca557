"""The driver's hooks in a running Tuner: files, display, the workers' heartbeat, an early end."""

import errno
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ray.tune import Callback, Checkpoint
from ray.tune.experiment import Trial

from higgs_tune.errors import HiggsTuneError, SweepError
from higgs_tune.metrics import STEP, VAL_AUDIO_NLL
from higgs_tune.sweep.boards import Boards
from higgs_tune.sweep.control import Control
from higgs_tune.sweep.folder import disk_error
from higgs_tune.sweep.given_up import cause_of, reason_of
from higgs_tune.sweep.later import Later
from higgs_tune.sweep.live import SHOWN, Display
from higgs_tune.sweep.records import TrialFiles
from higgs_tune.sweep.seats import CHECKPOINT_INFO, CheckpointError
from higgs_tune.sweep.source import TrialSource
from higgs_tune.sweep.study import TrialRecord, ending

BEAT_S = 1.0
Arguments = ParamSpec("Arguments")
T = TypeVar("T")


class SweepCallback(Callback):
    """Writes each trial's files as it runs and ends the Tuner when `control` says so."""

    def __init__(
        self,
        *,
        results: Path,
        files: TrialFiles,
        boards: Boards,
        later: Later,
        source: TrialSource,
        control: Control,
        display: Display,
        num_checkpoints: int,
        audio_limit: Callable[[], float],
        check_workers: Callable[[], None],
        close_workers: Callable[[], None],
    ) -> None:
        self._results = results
        self._files, self._boards, self._later = files, boards, later
        self._source = source
        self._control = control
        self._display = display
        self._num_checkpoints = num_checkpoints
        self._kept: dict[str, list[Path]] = {}  # trial id → Tune's checkpoints, the newest last
        self._audio_limit = audio_limit
        self._check_workers = check_workers
        self._close_workers = close_workers
        self._beat = 0.0
        self._last: dict[str, dict[str, Any]] = {}  # trial id → newest result, while it runs
        self._num_reported = 0
        self._num_failed = 0
        self._cancelled = False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles this only for Tuner.restore, which is never used here."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Check the workers, note paused trials, send the heartbeat and redraw."""
        self._guard(self._check_workers)
        self._guard(self._later.check)
        self._guard(self._boards.check)
        self._source.watch(trials)
        paused = {_record(trial).trial_id for trial in self._source.paused().values()}
        self._display.board.pause(paused)
        if time.monotonic() - self._beat >= BEAT_S:
            self._beat = time.monotonic()
            self._source.publish(beat=True)
        num_to_come = 0 if self._source.over() else self._source.num_to_come()
        self._display.board.expect(num_to_come, num_live=len(self._source.live))
        self._display.refresh()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """If the sweep stops, record the end of every running trial before Tune's slow cleanup."""
        if self._control.stopping:
            self.cancel()

    def cancel(self) -> None:
        """Record every running trial as cancelled, once; a resumed sweep continues it."""
        if self._cancelled:
            return
        self._cancelled = True
        reason = self._control.reason
        self._display.ending(reason)
        self._close_workers()
        self._source.stop()
        self._guard(self._source.cancel_live, reason)
        for trial_id in list(self._last):
            self._end(trial_id, "cancelled", reason)

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Prepare files and display for a trial that starts, or starts again after a failure."""
        record = _record(trial)
        if self._cancelled:
            return
        self._later.wait(record.trial_id)
        known = self._guard(self._files.start, record)
        checkpoint = self._files.checkpoint_of(record.trial_id)
        step = 0 if checkpoint is None else checkpoint[1]
        self._last[record.trial_id] = {}
        self._display.board.start(record, step, known or {})
        self._display.event("trial_started", trial=record.trial_id, name=record.name, step=step)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Append the result to the trial's metrics."""
        record = _record(trial)
        trial_id = record.trial_id
        if trial_id not in self._last:
            return
        self._num_reported += 1
        self._last[trial_id] = result
        self._guard(self._files.result, trial_id, result)
        self._boards.update(record)
        self._display.board.result(trial_id, result)
        shown = {name: result.get(name) for name in (STEP, *SHOWN)}
        self._display.event("result", trial=trial_id, **shown)

    def on_checkpoint(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        checkpoint: Checkpoint,
        **info: Any,
    ) -> None:
        """Make the newest checkpoint the trial's adapter.

        This runs beside Tune's loop, unless the trial has ended: then before its end is recorded.
        """
        trial_id = _record(trial).trial_id
        source = Path(checkpoint.path)
        kept = [path for path in self._kept.get(trial_id, []) if path != source] + [source]
        self._kept[trial_id] = kept[-self._num_checkpoints :]
        stale = kept[: -self._num_checkpoints]
        is_wanted = trial_id in self._last and (source / CHECKPOINT_INFO).exists()

        def take() -> None:
            if is_wanted:
                self._files.checkpoint(trial_id, source)
            for path in stale:
                shutil.rmtree(path, ignore_errors=True)  # leftovers go when the sweep ends

        self._later.do(trial_id, take)
        if self._last.get(trial_id, {}).get("status") != "running":
            self._later.wait(trial_id)
            self._guard(self._later.check)
            if self._control.error is not None:  # before Tune ends it without its last adapter
                self.cancel()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record the end of a trial that ended by itself or that the scheduler stopped."""
        trial_id = _record(trial).trial_id
        if trial_id in self._last:
            status, reason = ending(self._last[trial_id])
            self._end(trial_id, status, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Record as cancelled a trial that Tune gave up: it is not at fault, and --resume continues it."""
        record, cause = _record(trial), cause_of(trial)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            self._control.fail(disk_error(self._results, cause))
        if isinstance(cause, CheckpointError):
            self._control.fail(cause)
        self._last.setdefault(record.trial_id, {})
        self._end(record.trial_id, "cancelled", reason_of(trial))
        self._num_failed += 1
        if self._num_reported == 0 and self._num_failed >= 4:
            self._control.fail(
                SweepError(f"{self._num_failed} trials failed and none has trained; last: {cause}")
            )

    def _end(self, trial_id: str, status: str, reason: str | None) -> None:
        self._later.wait(trial_id)
        last = self._last.pop(trial_id)
        audio = last.get(VAL_AUDIO_NLL)
        is_feasible = None if audio is None else bool(audio <= self._audio_limit())
        self._guard(self._files.end, trial_id, status, reason, is_feasible)
        self._boards.end(trial_id)
        if status != "cancelled" and self._num_checkpoints == 1:  # else a copy may have to read it
            for path in self._kept.pop(trial_id, []):
                shutil.rmtree(path, ignore_errors=True)
        self._display.board.end(trial_id, status, is_feasible)
        self._display.event(
            "trial_ended", trial=trial_id, status=status, reason=reason, step=last.get(STEP, 0)
        )

    def _guard(
        self, action: Callable[Arguments, T], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> T | None:
        """Return what `action` returns; an error that a user can fix ends the sweep cleanly.

        Tune only logs what some of its hooks raise and goes on; a sweep with a full disk must not.
        """
        try:
            return action(*args, **kwargs)
        except OSError as error:
            self._control.fail(disk_error(self._results, error))
        except HiggsTuneError as error:
            self._control.fail(error)
        return None


def _record(trial: Trial) -> TrialRecord:
    return TrialRecord.from_dict(trial.config["record"])
