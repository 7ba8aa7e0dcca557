"""A side of a benchmark while it is measured: its first losses, its times, and its end if memory ends."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from host_syncs import count_host_syncs
from sides import Step, synchronise

from higgs_tune.data.tokens import Encoded
from higgs_tune.errors import is_out_of_memory

NUM_CHECKED = 3  # first steps whose losses are compared, and warm-up
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # of a loss, relative

Batch = Sequence[Sequence[Encoded]]  # adapter → examples


@dataclass
class Side:
    """One way of training; without a step it has run out of memory."""

    adapters: int
    device: torch.device
    step: Step | None = None
    losses: list[list[float]] = field(default_factory=list)  # of the checked steps, per adapter
    host_syncs: int | None = None
    peak_bytes: int | None = None  # as if the other side were not there
    times: list[float] = field(default_factory=list)

    @classmethod
    def made(
        cls,
        build: Callable[[], Step],
        adapters: int,
        batches: Sequence[Batch],
        device: torch.device,
        base_bytes: int,
        *,
        count_syncs: bool = True,
    ) -> "Side":
        """Build a side and do its first steps."""
        side = cls(adapters, device)
        cuda = device.type == "cuda"
        others = torch.cuda.memory_allocated(device) - base_bytes if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        side.attempt(lambda: side.start(build(), batches, count_syncs=count_syncs))
        if cuda:
            side.peak_bytes = torch.cuda.max_memory_allocated(device) - others
        return side

    def attempt(self, act: Callable[[], None]) -> None:
        """Do something; if memory runs out, let go of the step and all that it holds."""
        failed = False
        try:
            act()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True  # the traceback holds tensors until this block ends
        if failed:
            self.step = None
            free_memory()

    def start(self, step: Step, batches: Sequence[Batch], *, count_syncs: bool) -> None:
        """The checked steps, then one whose host syncs are counted."""
        for batch in batches[:NUM_CHECKED]:
            self.losses.append([float(loss) for loss in step(batch[: self.adapters])])
        if count_syncs:
            first = batches[0][: self.adapters]
            self.host_syncs = count_host_syncs(lambda: step(first), self.device)
        self.step = step

    def timed(self, batch: Batch) -> None:
        """One step between two waits for the device, after one that warms this side's memory."""
        if (step := self.step) is None:
            return
        step(batch[: self.adapters])
        synchronise(self.device)
        started = time.perf_counter()
        step(batch[: self.adapters])
        synchronise(self.device)
        self.times.append(time.perf_counter() - started)

    def figures(self, tokens: int) -> dict[str, Any]:
        """What was measured; `tokens` are one adapter's in a step."""
        if self.step is None:
            return {"status": "out_of_memory"}
        seconds = statistics.median(self.times)
        return {
            "status": "ok",
            "ms": round(1000 * seconds, 3),
            "tokens_per_s": round(self.adapters * tokens / seconds, 1),
            "peak_gib": None if self.peak_bytes is None else round(self.peak_bytes / 2**30, 3),
            "host_syncs": self.host_syncs,
            "losses": self.losses,
            "every_ms": [round(1000 * t, 3) for t in self.times],
        }


def free_memory() -> None:
    """Give what nothing refers to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_losses(ours: Side, stock: Side, dtype: torch.dtype) -> int:
    """Stop unless the first adapter's losses are the stock ones; returns how many were compared."""
    pairs = list(zip(ours.losses, stock.losses, strict=False))  # out of memory, a side has fewer
    for step, ((mine, *_), (theirs,)) in enumerate(pairs):
        if not abs(mine - theirs) <= TOLERANCE[dtype] * abs(theirs):
            raise SystemExit(f"step {step}: our loss is {mine}, the stock one {theirs}")
    return len(pairs)
