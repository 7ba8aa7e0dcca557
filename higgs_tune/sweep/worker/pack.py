"""What a worker lets its loop do, on the pack's thread."""

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
    """What base.json says of a loop's base and data."""
    return {
        "metrics": dict(loop.base_metrics),
        "preflight": dict(loop.preflight),
        "content_hash": loop.content_hash,
        "num_val_clips": len(loop.transcribe),
    }


def load_error(error: Exception, node: str) -> HiggsTuneError:
    """Why base and data cannot be loaded on a node."""
    if isinstance(error, HiggsTuneError):
        return type(error)(f"on node {node}: {error}")
    what = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return NoMemoryError(f"on node {node} finds no memory for base and data: {what}")
    return SweepError(f"on node {node} cannot load base and data: {what}")


def change(loop: Loop, out: Sequence[Seat], joining: Sequence[Seat]) -> list[Result]:
    """Free slots, then fill them: of each that joins its account, or its end.

    Raises:
        Exception: it is the machine's fault and not the trials'.
    """
    for seat in out:
        loop.leave(seat.trial_id)
    outcomes = [_join(loop, seat) for seat in joining]
    _check_memory(loop, outcomes)
    return outcomes


def advance(
    loop: Loop, stop: Callable[[], bool]
) -> tuple[dict[str, Result], dict[str, Snapshot], dict[str, float]]:
    """Train until a trial is due or `stop` says so; who has ended leaves.

    Returns:
        Results and snapshots of who was due, by trial, and seconds by kind.

    Raises:
        Exception: it is the machine's fault and not the trials'.
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
    """Seat a trial in the loop, or say why it cannot be: the others go on without it.

    Raises:
        Exception: it is the machine's fault and not the trial's: a file cannot be written or read here,
            or not even the base can be computed.
    """
    if seat.files is None:
        return _seat(loop, seat, None)
    with tempfile.TemporaryDirectory() as folder:
        write_files(seat.files, Path(folder))
        return _seat(loop, seat, Path(folder))


def _seat(loop: Loop, seat: Seat, folder: Path | None) -> Result:
    try:
        return {"account": loop.join(seat.trial_id, seat.config, folder)}
    except Exception as error:  # raised again, or recorded as its end; `join` has freed the slot
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
    """Raise if memory has emptied the pack and the bare base finds none either: somebody else has it."""
    statuses = {result.get("status") for result in results}
    if not loop.num_residents and statuses == {"out_of_memory"}:
        loop.check()


def _is_of_files(error: Exception) -> bool:
    """Whether the machine could not read or write; a file that is missing is the checkpoint's own fault."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
