"""What a worker, its trials and the driver say to each other."""

import asyncio
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from higgs_tune.config import TrialConfig
from higgs_tune.errors import SweepError

Files = dict[str, bytes]  # a checkpoint folder: relative path → content
Result = dict[str, Any]
DEFAULT_LOOP = "higgs_tune.train.sweep_pack:sweep_loop"
CHECKPOINT_INFO = "checkpoint.json"  # beside the adapter: {"trial_id", "step"}


class Loop(Protocol):
    """What a worker needs from train.loop.PackLoop."""

    base_metrics: dict[str, float]
    preflight: dict[str, Any]
    content_hash: str  # of the dataset

    def join(
        self, trial_id: str, config: TrialConfig, state_dir: Path | None = None
    ) -> dict[str, Any]:
        """Seat a trial; returns its account of modules and parameters."""
        ...

    def advance(self) -> dict[str, dict[str, Any]]:
        """Train every resident one interval and validate."""
        ...

    def leave(self, trial_id: str) -> None:
        """Free a resident's slot."""
        ...

    def save(self, trial_id: str, directory: Path) -> None:
        """Write a resident's adapter and training state."""
        ...


@dataclass(frozen=True)
class Roster:
    """Whom the driver counts as running, and how many more it will send."""

    version: int
    live: tuple[str, ...]
    to_come: int


@dataclass
class Seat:
    """One trial in a worker, from its lease until the roster drops it."""

    trial_id: str
    config: TrialConfig
    files: Files | None  # the checkpoint it starts from
    roster_version: int  # the first roster that names it
    resident: bool = False  # the loop knows it
    waiting: "asyncio.Future[Result] | None" = None
    result: Result | None = None  # trained, not yet handed out
    step: int = 0


class SlotLostError(SweepError):
    """The worker no longer knows the trial; Tune restarts it from its last checkpoint."""


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
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_files(files: Files, directory: Path) -> None:
    """Write what `read_files` returned below `directory`."""
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
