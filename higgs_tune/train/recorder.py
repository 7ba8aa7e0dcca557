"""Keeps what a training run reaches: figures, checkpoints, samples. Only the main process writes."""

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
    """Who is told, in the main process: of lines that are safe on disk, steps, and samples."""

    report: Callable[[Line], None]
    step: Callable[[int], None] = lambda step: None
    samples: Callable[[Sequence[Sample]], None] = lambda samples: None


class Recorder:
    """Writes a run's folder while `loop` trains; every process has one and calls it alike."""

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
        """Note the untouched base and the adapter to start from, or catch up with an earlier start.

        Raises:
            ModelError: a loss of the adapter to start from is not finite.
        """
        if not self.lines:
            self._write({metrics.STEP: 0, **self._loop.base_metrics, "status": "running"})
            if self._run.start_from is not None:
                figures = self._loop.validate([self._id])[self._id]
                if (odd := metrics.not_finite(figures)) is not None:
                    raise ModelError(
                        f"run.start_from: {self._run.start_from}: {odd} as it starts: that training "
                        "diverged, or had another base. Start from another adapter, with another --out."
                    )
                start = {metrics.STEP: 0, **figures, "status": "running"}
                self.record(start | {"start_from": self._run.start_from})
        elif (self._out / folder.ADAPTER).exists():
            self._saved = self._loop.position(self._id)
            if self.lines[-1][metrics.STEP] == self._saved[0] and len(self.lines) > 1:
                self._world.on_main(self._keep)

    def record(self, result: Line) -> Line:
        """Write the line of a validation, a checkpoint, and what is kept beside it; returns the line.

        The line comes before the checkpoint, and its followers after: a run that is killed goes on
        from the checkpoint, without the lines behind it, and does again what came after.
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
        """Write a checkpoint of where the run stands, unless the newest one is that already.

        None is written of an adapter whose gradient was not finite: the one before it is good.
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
        """What follows a validated checkpoint; doing it again changes nothing."""
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
        """What the adapter on the disk writes down; None if memory does not hold it beside the training."""
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
    """Why to end after the last of these validations, the untouched base's first; None to go on."""
    if run.early_stop_patience is None:
        return None
    best, best_step, waited = float("inf"), 0, 0
    for line in lines[1:]:
        nll = line.get(metrics.VAL_TEXT_NLL)
        if nll is None:  # diverged or out of memory: it has ended for that reason
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
    """The newest line, as completed if the run ends early with it.

    By settings that may be others than those it was written with.
    """
    line, reason = dict(lines[-1]), early_stop_reason(lines, run)
    if reason is not None and line["status"] == "running":
        line |= {"status": "completed", "reason": reason}
    return line


def is_finished(out: Path, lines: Sequence[Line], trial: TrialConfig, run: RunSettings) -> bool:
    """Whether a run has reached its end, its samples written; `keep_again` sees to its copies."""
    if not lines:
        return False
    step = lines[-1][metrics.STEP]
    ended = step >= trial.num_steps or early_stop_reason(lines, run) is not None
    return ended and (not run.num_samples or folder.last_sampled_step(out) == step)
