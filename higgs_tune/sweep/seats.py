"""What a worker, its trials and the driver exchange, and what a worker keeps of a trial."""

import asyncio
import gc
import importlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from higgs_tune.config import TrialConfig
from higgs_tune.errors import SweepError

# A checkpoint folder: relative path → content, uint8. Ray passes arrays without a copy, bytes with three.
Files = dict[str, np.ndarray]
Result = dict[str, Any]
Lease = Literal["seated", "full", "outdated", "away"]
Snapshot = Callable[[Path], None]  # writes a checkpoint into an empty folder
DEFAULT_LOOP = "higgs_tune.train.sweep_pack:sweep_loop"
SITS_AT = "sits_at"  # in a result for the driver: index of the worker where the trial sits
CHECKPOINT_INFO = "checkpoint.json"  # beside the adapter: {"trial_id", "step"}


class Loop(Protocol):
    """What a worker needs from train.loop.PackLoop."""

    base_metrics: dict[str, float]
    preflight: dict[str, Any]
    content_hash: str  # of the dataset
    prepare_s: float  # reading and tokenising, in all calls of `advance` so far
    validate_s: float

    @property
    def transcribe(self) -> Sequence[Any]:
        """The validation clips; each one's text is also validated after another one's audio."""
        ...

    @property
    def train_s(self) -> float:
        """Seconds of forward, backward and optimizer, in all calls of `advance` so far."""
        ...

    @property
    def num_residents(self) -> int:
        """Trials that have joined and not left."""
        ...

    @property
    def num_forwards(self) -> int:
        """Forwards so far, in training and validation: grows while the pack makes progress."""
        ...

    def join(
        self, trial_id: str, config: TrialConfig, state_dir: Path | None = None
    ) -> dict[str, Any]:
        """Seat a trial; returns its account of modules and parameters."""
        ...

    def advance(self, stop: Callable[[], bool] | None = None) -> dict[str, dict[str, Any]]:
        """Train all residents until some are due or `stop` returns true after a step.

        Returns:
            Validated results of the residents that are due, by trial.
        """
        ...

    def leave(self, trial_id: str) -> None:
        """Free a resident's slot."""
        ...

    def check(self) -> None:
        """Compute the base without any adapter; raises if this process cannot even do that."""
        ...

    def snapshot(self, trial_id: str) -> Snapshot:
        """A function that writes, at any later time, a resident's adapter and training state of now."""
        ...


@dataclass(frozen=True)
class Roster:
    """The trials that the driver counts as running, and how many more it will send."""

    version: int
    live: tuple[str, ...]
    to_come: int
    room: int | None = None  # how many it sends for now; None: as many as there are seats
    new: Mapping[str, TrialConfig] = field(default_factory=dict)  # live, without a result

    def num_sent(self, num_seats: int) -> int:
        """How many trials a strict worker with `num_seats` seats gets for now."""
        return num_seats if self.room is None else min(self.room, num_seats)


@dataclass(eq=False)
class Report:
    """A result on its way to the driver."""

    batch: int  # counts the table's calls that made reports
    trial_id: str
    result: Result
    snapshot: Snapshot | None  # None: nothing is kept of a trial that ended badly
    takes_effect: int  # the pack's step at which what follows from it takes effect
    written: asyncio.Future[Any] | None = None  # a reference to the written checkpoint; used once
    num_bytes: int = 0  # of that checkpoint

    def turn(self) -> tuple[int, int, str]:
        """The sort key of outgoing reports: those that the pack needs first come first."""
        return self.batch, self.takes_effect, self.trial_id


@dataclass(eq=False)
class Seat:
    """One trial in a worker, from its lease until the roster drops it."""

    trial_id: str
    config: TrialConfig
    files: Files | None  # the checkpoint it starts from
    roster_version: int  # the first roster that names it
    is_early: bool = False  # seated by the roster alone: its process may come later
    asks: bool = False  # its trainable waits for the next result
    since: int | None = None  # the pack's step from which it may train, once that is known
    ended: bool = False  # it never trains again
    account: dict[str, Any] | None = None  # of its modules; goes out with its first result
    last: Report | None = None  # handed out
    refused_after: int | None = None  # departures so far when it found no memory for its slot
    reports: deque[Report] = field(default_factory=deque)  # not handed out yet

    def begins_like(self, config: TrialConfig, files: Files | None) -> bool:
        """Whether the seat is as good as new for a process that joins with these."""
        return files is None and self.files is None and self.last is None and self.config == config


class SlotLostError(SweepError):
    """The worker no longer knows the trial; Tune restarts it from its last checkpoint."""


class CheckpointError(SweepError):
    """A worker's machine cannot write checkpoints, without which trials would be trained in vain."""


def num_seats(num_slots: int, *, strict: bool) -> int:
    """How many trials a worker takes: one per slot, and some that wait to fill a freed slot at once.

    The more slots, the more trials end together. A slot for which none waits stays empty until the driver
    has proposed its next trial, one after the other. With several workers, each keeps only one trial
    waiting, because others may have room.
    """
    return num_slots + (max(1, num_slots // 2) if strict else 1)


def import_loop(path: str) -> Callable[..., Loop]:
    """Import the callable `module:name`, without garbage collection.

    Torch and transformers create hundreds of thousands of objects that stay for good. Looking for garbage
    among them would take 0.6 of the import's 4.6 s, and later pause the training.
    """
    module, _, name = path.partition(":")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        loaded = importlib.import_module(module)
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    return cast("Callable[..., Loop]", getattr(loaded, name))


def read_files(directory: Path) -> Files:
    """Every file below `directory`, by its relative path."""
    return {
        str(path.relative_to(directory)): np.fromfile(path, np.uint8)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_files(files: Files, directory: Path) -> None:
    """Write files from `read_files` below `directory`."""
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)  # type: ignore[arg-type]  # typed as a buffer only from Python 3.12
