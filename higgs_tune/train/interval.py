"""Metrics over the optimizer steps since the last report.

Shape letters: S steps, C codebooks.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from higgs_tune import metrics
from higgs_tune.data.collate import TargetCounts
from higgs_tune.train.parallel import ALONE, World

_FIGURES = ("sums", "norms", "text_count", "audio_counts", "num_rows", "seconds", "seconds_before")


@dataclass
class Interval:
    """Sums over an interval: equal in all processes after `gather`, and part of a checkpoint."""

    sums: list[list[float]] = field(default_factory=list)  # (S, 1 + C) nats: text, then codebooks
    norms: list[float] = field(default_factory=list)  # (S,)
    text_count: int = 0
    audio_counts: list[int] = field(default_factory=list)  # (C,)
    num_rows: int = 0
    seconds: float = 0.0
    seconds_before: float = 0.0  # seconds of the run's earlier intervals
    # steps still on the device: this process's nats (1 + C,), and the gradient norm
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pending_rows: int = 0

    @property
    def num_steps(self) -> int:
        """Steps since the last report."""
        return len(self.sums) + len(self.pending)

    def add(self, sum_C: Tensor, norm: Tensor, counts: TargetCounts, num_rows: int) -> None:
        """Record a step without waiting for the device.

        Args:
            sum_C: this process's nats, text before codebooks.
            norm: gradient norm.
            counts: targets of all processes.
            num_rows: this process's rows.
        """
        self.pending.append((sum_C, norm))
        self.pending_rows += num_rows
        self.text_count += counts.text
        before = self.audio_counts or [0] * len(counts.audio_C)
        self.audio_counts = [a + int(b) for a, b in zip(before, counts.audio_C, strict=True)]

    def gather(self, world: World = ALONE) -> None:
        """Sum over the processes; waits for the device and for the other processes."""
        if not self.pending:
            return
        sums = torch.stack([sum_C for sum_C, _ in self.pending]).double().cpu()
        self.sums += world.sum(sums).tolist()
        self.norms += torch.stack([norm for _, norm in self.pending]).tolist()
        self.num_rows += int(world.sum(torch.tensor([self.pending_rows]))[0])
        self.pending, self.pending_rows = [], 0

    def state(self) -> dict[str, Any]:
        """A gathered interval as plain data for `Interval(**state)`."""
        assert not self.pending
        return deepcopy({name: getattr(self, name) for name in _FIGURES})

    def next(self) -> "Interval":
        """The empty interval that follows this one."""
        return Interval(seconds_before=self.seconds_before + self.seconds)

    def metrics(self) -> dict[str, float]:
        """Means over the targets of a gathered interval; NaN for a modality without targets.

        An interval without a step has only its time.
        """
        time = {metrics.TRAIN_TIME_S: self.seconds_before + self.seconds}
        if not self.sums:
            return time
        text, *audio = (math.fsum(column) for column in zip(*self.sums, strict=True))
        per_code = [
            nats / count if count else math.nan
            for nats, count in zip(audio, self.audio_counts, strict=True)
        ]
        return {
            metrics.TRAIN_TEXT_NLL: text / self.text_count if self.text_count else math.nan,
            metrics.TRAIN_AUDIO_NLL: sum(per_code) / len(per_code),
            metrics.GRAD_NORM: median_low(self.norms),
            metrics.TOKENS_PER_S: self.num_rows / self.seconds,
            **time,
        }
