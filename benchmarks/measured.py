"""One side of a benchmark while it is measured: its first losses, its times, or that memory ran out."""

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

NUM_CHECKED = 3  # first steps, whose losses are compared; they are also the warm-up
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative, of a loss

Batch = Sequence[Sequence[Encoded]]  # adapter → examples


@dataclass
class Side:
    """One way of training; `step` is None once it has run out of memory."""

    adapters: int
    device: torch.device
    step: Step | None = None
    losses: list[list[float]] = field(default_factory=list)  # of the checked steps, per adapter
    host_syncs: int | None = None
    peak_bytes: int | None = None  # without what the other side holds
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
        """Build a side and run its first steps."""
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
        """Call `act`; if memory runs out, drop the step and free its memory."""
        failed = False
        try:
            act()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True  # free later: the traceback holds tensors until this block ends
        if failed:
            self.step = None
            free_memory()

    def start(self, step: Step, batches: Sequence[Batch], *, count_syncs: bool) -> None:
        """Run the checked steps, then one whose host syncs are counted."""
        for batch in batches[:NUM_CHECKED]:
            self.losses.append([float(loss) for loss in step(batch[: self.adapters])])
        if count_syncs:
            first = batches[0][: self.adapters]
            self.host_syncs = count_host_syncs(lambda: step(first), self.device)
        self.step = step

    def timed(self, batch: Batch) -> None:
        """Time one step between two device synchronisations, after an untimed one that warms up memory."""
        if (step := self.step) is None:
            return
        step(batch[: self.adapters])
        synchronise(self.device)
        started = time.perf_counter()
        step(batch[: self.adapters])
        synchronise(self.device)
        self.times.append(time.perf_counter() - started)

    def figures(self, tokens: int) -> dict[str, Any]:
        """What was measured; `tokens` is one adapter's number per step."""
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
    """Return memory that nothing refers to any more to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_losses(ours: Side, stock: Side, dtype: torch.dtype) -> int:
    """Exit unless our first adapter's losses match the stock ones; returns how many were compared."""
    pairs = list(zip(ours.losses, stock.losses, strict=False))  # out of memory: fewer losses
    for step, ((mine, *_), (theirs,)) in enumerate(pairs):
        if not abs(mine - theirs) <= TOLERANCE[dtype] * abs(theirs):
            raise SystemExit(f"step {step}: our loss is {mine}, but the stock loss is {theirs}")
    return len(pairs)
