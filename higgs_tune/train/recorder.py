"""Records a training run: metrics, checkpoints, samples. Only the main process writes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from higgs_tune import metrics
from higgs_tune.config import RunSettings, TrialConfig
from higgs_tune.errors import ModelError, is_out_of_memory, release_frames
from higgs_tune.files import append_json_line, replace_folder
from higgs_tune.train import run_folder as folder
from higgs_tune.train.board import Board
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.parallel import World
from higgs_tune.train.run_folder import Line
from higgs_tune.train.samples import Sample, sample_predictions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watcher:
    """Callbacks in the main process: for lines that are safe on disk, steps, and samples."""

    report: Callable[[Line], None]
    step: Callable[[int], None] = lambda step: None
    samples: Callable[[Sequence[Sample]], None] = lambda samples: None


class Recorder:
    """Writes a run's folder while `loop` trains; every process has one and makes the same calls."""

    def __init__(
        self,
        loop: PackLoop,
        trial_id: str,
        out: Path,
        run: RunSettings,
        world: World,
        watcher: Watcher,
        lines: list[Line],
    ) -> None:
        self.lines = lines
        self._loop, self._id, self._out = loop, trial_id, out
        self._run, self._world, self._watcher = run, world, watcher
        self._saved: tuple[int, int] | None = None
        self._board: Board | None = None
        if run.tensorboard and world.is_main:
            next_step = lines[-1][metrics.STEP] + 1 if lines else 0
            self._board = Board(out / folder.BOARD, next_step)

    def start(self) -> None:
        """Record the losses of the untouched base and of `run.start_from`, or catch up with an earlier start.

        Raises:
            ModelError: a loss of the adapter to start from is not finite.
        """
        if not self.lines:
            self._write({metrics.STEP: 0, **self._loop.base_metrics, "status": "running"})
            if self._run.start_from is not None:
                figures = self._loop.validate([self._id])[self._id]
                if (odd := metrics.not_finite(figures)) is not None:
                    raise ModelError(
                        f"run.start_from: {self._run.start_from}: {odd} at the start: its training "
                        "diverged, or had another base. Start from another adapter, with another --out."
                    )
                start = {metrics.STEP: 0, **figures, "status": "running"}
                self.record(start | {"start_from": self._run.start_from})
        elif (self._out / folder.ADAPTER).exists():
            self._saved = self._loop.position(self._id)
            if self.lines[-1][metrics.STEP] == self._saved[0] and len(self.lines) > 1:
                self._world.on_main(self._keep)

    def record(self, result: Line) -> Line:
        """Write a validation's line, then a checkpoint, then its copies and samples; returns the line.

        The order lets a killed run resume: it goes on from the newest checkpoint, drops the lines after
        it, and makes the copies and samples again.
        """
        line = last_line([*self.lines, result], self._run)
        is_healthy = line["status"] in metrics.HEALTHY
        self._write(line, report=False)
        if is_healthy:
            self.save()
        if self._world.is_main:
            self._watcher.report(line)
        if is_healthy:
            self._world.on_main(self._keep)
        return line

    def save(self) -> None:
        """Write a checkpoint of the current position, unless the newest one already is.

        Skips an adapter whose gradient was not finite, to keep the last good checkpoint.
        """
        position = self._loop.position(self._id)
        if position == self._saved or not self._loop.gather(self._id):
            return

        def write() -> None:
            with folder.writing(self._out):
                replace_folder(self._out / folder.ADAPTER, self._loop.snapshot(self._id))

        self._world.on_main(write)
        self._saved = position

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()

    def _write(self, line: Line, *, report: bool = True) -> None:
        def write() -> None:
            with folder.writing(self._out):
                append_json_line(self._out / folder.METRICS, line)
                if self._board is not None:
                    self._board.add(line)

        self._world.on_main(write)
        self.lines.append(line)
        if report and self._world.is_main:
            self._watcher.report(line)

    def _keep(self) -> None:
        """Make the copies and samples of a validated checkpoint; doing it again changes nothing."""
        step = self.lines[-1][metrics.STEP]
        with folder.writing(self._out):
            folder.keep(self._out, self.lines, self._run)
        if not self._run.num_samples:
            return
        samples = self._samples()
        if samples is None:
            return
        with folder.writing(self._out):
            folder.write_samples(self._out, step, samples)
            if self._board is not None:
                self._board.add_samples(step, samples)
        self._watcher.samples(samples)

    def _samples(self) -> list[Sample] | None:
        """Transcribe clips with the adapter on disk; None if memory runs out beside the training."""
        clips, count = self._loop.transcribe, self._run.num_samples
        try:
            return sample_predictions(
                self._loop.base,
                self._out / folder.ADAPTER,
                clips[:: max(1, len(clips) // count)][:count],  # spread over all of them
                self._run.max_sample_tokens,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_frames(error)
            logger.warning(
                "no memory for samples beside the training, see run.num_samples: %s", error
            )
            return None


def early_stop_reason(lines: Sequence[Line], run: RunSettings) -> str | None:
    """Why to stop after the last of these lines, the first being the untouched base's; None to go on."""
    if run.early_stop_patience is None:
        return None
    best, best_step, waited = float("inf"), 0, 0
    for line in lines[1:]:
        nll = line.get(metrics.VAL_TEXT_NLL)
        if nll is None:  # diverged or out of memory: it has ended already
            return None
        if nll < best - run.early_stop_min_delta:
            best, best_step, waited = nll, line[metrics.STEP], 0
        else:
            waited += 1
    if waited < run.early_stop_patience:
        return None
    return (
        f"early stop: {metrics.VAL_TEXT_NLL} was {best:.4f} at step {best_step} and not better in "
        f"{waited} validations since"
    )


def last_line(lines: Sequence[Line], run: RunSettings) -> Line:
    """The newest line, marked as completed if the run stops early with it.

    The current settings decide, which may differ from those when the line was written.
    """
    line, reason = dict(lines[-1]), early_stop_reason(lines, run)
    if reason is not None and line["status"] == "running":
        line |= {"status": "completed", "reason": reason}
    return line


def is_finished(out: Path, lines: Sequence[Line], trial: TrialConfig, run: RunSettings) -> bool:
    """Whether a run has reached its end with its samples written; `keep_again` completes its copies."""
    if not lines:
        return False
    step = lines[-1][metrics.STEP]
    ended = step >= trial.num_steps or early_stop_reason(lines, run) is not None
    return ended and (not run.num_samples or folder.last_sampled_step(out) == step)
