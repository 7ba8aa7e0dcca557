"""Shows a training run: a live progress line in a terminal, JSON lines anywhere else."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from higgs_tune.data.progress import duration
from higgs_tune.files import json_line
from higgs_tune.metrics import EPOCH, STEP, VAL_AUDIO_GAIN, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.train.samples import Sample

_SHOWN = (("text", VAL_TEXT_NLL), ("audio", VAL_AUDIO_NLL), ("gain", VAL_AUDIO_GAIN))


class Pace:
    """Steps per second since this start, and the estimated time left."""

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> str:
        """The pace after `step`; empty until two steps are done."""
        if self._first is None:
            self._first = step, self._clock()
        first_step, since = self._first
        if step == first_step or self._clock() == since:
            return ""
        rate = (step - first_step) / (self._clock() - since)
        return f"{rate:.2f} steps/s · {duration((self._num_steps - step) / rate)} left"


class Display:
    """Shows a run; a context manager, which leaves the terminal tidy."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._num_steps = num_steps
        self._pace = Pace(num_steps)
        self._progress: Progress | None = None
        if self._stream.isatty():
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[pace]}"),
                console=Console(file=self._stream),
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._progress.add_task("", total=num_steps, pace="")

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, step: int) -> None:
        """Show that an optimizer step is done; only the main process calls this."""
        if self._progress is not None:
            self._progress.start()  # no effect if already started
            self._progress.update(self._task, completed=step, pace=self._pace.after(step))

    def line(self, line: dict[str, Any]) -> None:
        """Show the metrics of a validation."""
        if self._progress is None:
            print(json_line(line), file=self._stream, flush=True)
            return
        figures = "   ".join(f"{label} {line[name]:.3f}" for label, name in _SHOWN if name in line)
        end = "" if line["status"] == "running" else f"   {line['status']} {line.get('reason', '')}"
        if "start_from" in line:
            end = f"   started from {line['start_from']}"
        width = len(str(self._num_steps))
        epoch = f"   epoch {line[EPOCH]:.2f}" if EPOCH in line else ""
        text = f"step {line[STEP]:>{width}}/{self._num_steps}{epoch}   {figures}{end}".rstrip()
        self._progress.console.print(Text(text))

    def samples(self, samples: Sequence[Sample]) -> None:
        """Show transcribed validation clips, in a terminal only."""
        if self._progress is None:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("  target")
        table.add_column("predicted")
        for sample in samples:
            cut = "" if sample.ended else " …"
            table.add_row(Text(f"  {sample.target}"), Text(sample.predicted + cut))
        self._progress.console.print(table)
