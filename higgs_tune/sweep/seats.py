"""What a worker, its trials and the driver say to each other, and what a worker notes of a trial."""

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

# A checkpoint folder: relative path → content, uint8. Ray hands arrays on without a copy, bytes with three.
Files = dict[str, np.ndarray]
Result = dict[str, Any]
Lease = Literal["seated", "full", "outdated", "away"]
Snapshot = Callable[[Path], None]  # writes a checkpoint into an empty folder
DEFAULT_LOOP = "higgs_tune.train.sweep_pack:sweep_loop"
SITS_AT = "sits_at"  # in a result for the driver: the worker that the trial found, by its place in the list
CHECKPOINT_INFO = "checkpoint.json"  # beside the adapter: {"trial_id", "step"}


class Loop(Protocol):
    """What a worker needs from train.loop.PackLoop."""

    base_metrics: dict[str, float]
    preflight: dict[str, Any]
    content_hash: str  # of the dataset
    prepare_s: float  # of all calls of `advance` so far: reading and tokenising
    validate_s: float

    @property
    def transcribe(self) -> Sequence[Any]:
        """The validation clips, each of them validated after another one's audio, too."""
        ...

    @property
    def train_s(self) -> float:
        """Forward, backward and optimizer, of all calls of `advance` so far."""
        ...

    @property
    def num_residents(self) -> int:
        """Trials that have joined and not left."""
        ...

    @property
    def num_forwards(self) -> int:
        """What was computed so far, in training and validation: grows while the pack gets anywhere."""
        ...

    def join(
        self, trial_id: str, config: TrialConfig, state_dir: Path | None = None
    ) -> dict[str, Any]:
        """Seat a trial; returns its account of modules and parameters."""
        ...

    def advance(self, stop: Callable[[], bool] | None = None) -> dict[str, dict[str, Any]]:
        """Train every resident until some are due or `stop` says so after a step; validate those."""
        ...

    def leave(self, trial_id: str) -> None:
        """Free a resident's slot."""
        ...

    def check(self) -> None:
        """Compute the base without any adapter; raises if this process cannot even do that."""
        ...

    def snapshot(self, trial_id: str) -> Snapshot:
        """What writes a resident's adapter and training state as they are now, at any time."""
        ...


@dataclass(frozen=True)
class Roster:
    """Whom the driver counts as running, and how many more it will send."""

    version: int
    live: tuple[str, ...]
    to_come: int
    room: int | None = None  # how many it sends for now; None: as many as there are seats
    new: Mapping[str, TrialConfig] = field(default_factory=dict)  # live, and nothing known of them

    def num_sent(self, num_seats: int) -> int:
        """How many trials a strict worker with so many seats gets for now."""
        return num_seats if self.room is None else min(self.room, num_seats)


@dataclass(eq=False)
class Report:
    """A result on its way to the driver."""

    batch: int  # the how manieth call of the table that made reports
    trial_id: str
    result: Result
    snapshot: Snapshot | None  # None: nothing is kept of a trial that ended badly
    takes_effect: int  # the pack's step from which what follows holds
    written: asyncio.Future[Any] | None = None  # refers to what the snapshot writes; used once
    num_bytes: int = 0  # of that

    def turn(self) -> tuple[int, int, str]:
        """By what reports go out: whom the pack waits for before the others."""
        return self.batch, self.takes_effect, self.trial_id


@dataclass(eq=False)
class Seat:
    """One trial in a worker, from its lease until the roster drops it."""

    trial_id: str
    config: TrialConfig
    files: Files | None  # the checkpoint it starts from
    roster_version: int  # the first roster that names it
    is_early: bool = False  # the roster says all that it needs: its process may come later
    asks: bool = False  # its trainable waits for the next result
    since: int | None = None  # the pack's step from which it may train, once that is known
    ended: bool = False  # it never trains again
    account: dict[str, Any] | None = None  # of its modules; goes out with its first result
    last: Report | None = None  # handed out
    refused_after: int | None = None  # so many departures it found no memory for its slot
    reports: deque[Report] = field(default_factory=deque)  # not handed out yet

    def begins_like(self, config: TrialConfig, files: Files | None) -> bool:
        """Whether a process that comes with these finds the trial as if it had just sat down."""
        return files is None and self.files is None and self.last is None and self.config == config


class SlotLostError(SweepError):
    """The worker no longer knows the trial; Tune restarts it from its last checkpoint."""


def num_seats(num_slots: int, *, strict: bool) -> int:
    """How many trials a worker takes: one a slot, and some that wait to fill a freed slot at once.

    The more slots the more end together, and whoever did not wait comes after the driver's next proposals,
    one after the other. Among several workers each keeps one, as others may have room.
    """
    return num_slots + (max(1, num_slots // 2) if strict else 1)


def import_loop(path: str) -> Callable[..., Loop]:
    """The callable behind `module:name`.

    Torch and transformers make objects by the hundred thousand that stay for good. Looking for garbage
    among them would be 0.6 of 4.6 s of this import, and a pause in the training later.
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
    """Every file below `directory`, by its path relative to it."""
    return {
        str(path.relative_to(directory)): np.fromfile(path, np.uint8)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_files(files: Files, directory: Path) -> None:
    """Write what `read_files` returned below `directory`."""
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)  # type: ignore[arg-type]  # stubs know its buffer from Python 3.12
