"""Figures and samples for TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from higgs_tune import metrics
from higgs_tune.train.samples import Sample


class Board:
    """Event files of a run. What an earlier start wrote from `next_step` on is hidden."""

    def __init__(self, directory: Path, next_step: int) -> None:
        # the name holds the second only: a start right behind another must not overwrite its file
        self._writer = SummaryWriter(
            str(directory), purge_step=next_step, filename_suffix=f".{next_step}"
        )

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the finite figures of a line of metrics."""
        for name, value in line.items():
            if name != metrics.STEP and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, line[metrics.STEP])
        self._writer.flush()

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write a table of what was heard."""
        rows = [
            "| target | predicted |",
            "|---|---|",
            *(f"| {s.target} | {s.predicted.replace('|', ' ')} |" for s in samples),
        ]
        self._writer.add_text("samples", "\n".join(rows), step)
        self._writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()
