"""A worker's calls of its training loop, run on the pack's thread."""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from higgs_tune.errors import HiggsTuneError, NoMemoryError, SweepError, is_out_of_memory
from higgs_tune.metrics import HEALTHY
from higgs_tune.sweep.seats import Loop, Result, Seat, Snapshot, write_files

logger = logging.getLogger(__name__)

NO_MEMORY = (
    "%s finds no memory for its slot and waits until a neighbour leaves. "
    "To avoid it, lower tune.slots_per_worker. (%s)"
)


def description(loop: Loop) -> dict[str, Any]:
    """The content of base.json for a loop's base and data."""
    return {
        "metrics": dict(loop.base_metrics),
        "preflight": dict(loop.preflight),
        "content_hash": loop.content_hash,
        "num_val_clips": len(loop.transcribe),
    }


def load_error(error: Exception, node: str) -> HiggsTuneError:
    """An error that says why a node cannot load base and data."""
    if isinstance(error, HiggsTuneError):
        return type(error)(f"on node {node}: {error}")
    what = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return NoMemoryError(f"on node {node} finds no memory for base and data: {what}")
    return SweepError(f"on node {node} cannot load base and data: {what}")


def change(loop: Loop, out: Sequence[Seat], joining: Sequence[Seat]) -> list[Result]:
    """Free slots, then fill them.

    Returns:
        For each trial that joins, in order: its account, or the result it ends with.

    Raises:
        Exception: the machine is at fault, not the trials.
    """
    for seat in out:
        loop.leave(seat.trial_id)
    outcomes = [_join(loop, seat) for seat in joining]
    _check_memory(loop, outcomes)
    return outcomes


def advance(
    loop: Loop, stop: Callable[[], bool]
) -> tuple[dict[str, Result], dict[str, Snapshot], dict[str, float]]:
    """Train until trials are due or `stop` returns true; trials that have ended leave the loop.

    Returns:
        Results of the trials that were due, snapshots of the healthy ones, and seconds by kind.

    Raises:
        Exception: the machine is at fault, not the trials.
    """
    trained_s, prepared_s, validated_s = loop.train_s, loop.prepare_s, loop.validate_s
    results = loop.advance(stop)
    started = time.monotonic()
    kept = [trial_id for trial_id, result in results.items() if result["status"] in HEALTHY]
    snapshots = {trial_id: loop.snapshot(trial_id) for trial_id in kept}
    for trial_id, result in results.items():
        if result["status"] != "running":
            loop.leave(trial_id)
    seconds = {
        "train_s": loop.train_s - trained_s,
        "prepare_s": loop.prepare_s - prepared_s,
        "validate_s": loop.validate_s - validated_s,
        "save_s": time.monotonic() - started,
    }
    _check_memory(loop, results.values())
    return results, snapshots, seconds


def _join(loop: Loop, seat: Seat) -> Result:
    """Seat a trial in the loop, or return why it cannot be; the others go on without it.

    Raises:
        Exception: the machine is at fault, not the trial: a file cannot be written or read here, or not
            even the base can be computed.
    """
    if seat.files is None:
        return _seat(loop, seat, None)
    with tempfile.TemporaryDirectory() as folder:
        write_files(seat.files, Path(folder))
        return _seat(loop, seat, Path(folder))


def _seat(loop: Loop, seat: Seat, folder: Path | None) -> Result:
    try:
        return {"account": loop.join(seat.trial_id, seat.config, folder)}
    except Exception as error:  # re-raised, or returned as its end; `join` has freed the slot
        reason = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            return {"status": "out_of_memory", "reason": reason}
        if _is_of_files(error):
            raise
        logger.error("%s cannot join", seat.trial_id, exc_info=error)
        if not isinstance(error, HiggsTuneError):
            loop.check()
        return {"status": "failed", "reason": reason}


def _check_memory(loop: Loop, results: Iterable[Result]) -> None:
    """Raise if lack of memory has emptied the pack and even the bare base finds none: others hold it."""
    statuses = {result.get("status") for result in results}
    if not loop.num_residents and statuses == {"out_of_memory"}:
        loop.check()


def _is_of_files(error: Exception) -> bool:
    """Whether reading or writing failed; a missing file does not count, as the checkpoint is at fault."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
