"""What a stopped run left behind: which job the folder belongs to, and which shards are done."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higgs_tune.data.audio import can_be_opened, locate, may_be_temporary
from higgs_tune.data.clips import reason_of
from higgs_tune.data.files import writing
from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.data.shards import INFO_NAME, SHARD_FOLDER, ShardFile, list_shards, shard_path
from higgs_tune.errors import DataError
from higgs_tune.files import write_json

JOB_NAME = "prepare.json"


def claim_folder(out: Path, job: dict[str, Any]) -> None:
    """Claim `out` for this job, or check that it already belongs to it.

    Raises:
        DataError: other data was prepared there; nothing is changed.
    """
    path = out / JOB_NAME
    advice = "Give another --out, or delete the folder to prepare it again."
    if not path.is_file():
        if (out / INFO_NAME).exists() or list_shards(out):
            raise DataError(f"{out}: holds a dataset that this command did not make. {advice}")
        with writing(path):
            write_json(path, job)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {advice}") from None
    changed = sorted(name for name in job if before.get(name) != job[name])
    if changed and holds_rows(out):
        raise DataError(
            f"{out}: was prepared differently: {', '.join(changed)} changed since. {advice}"
        )
    if changed:  # nothing is encoded yet, so nothing can be mixed up
        with writing(path):
            drop_shards(out, kept=0)
            write_json(path, job)
    # left by a run that was killed; `out` may hold the user's files as well
    for half_written in (*out.glob(".*.tmp"), *(out / SHARD_FOLDER).glob("*.tmp")):
        half_written.unlink()


def drop_shards(out: Path, kept: int) -> None:
    """Delete all shards but the first `kept`: a former run may have left fewer rows out."""
    first = {shard_path(out, index) for index in range(kept)}
    for path in set(list_shards(out)) - first:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)


def holds_rows(out: Path) -> bool:
    """Whether `out` has any encoded row; a shard whose rows were all rejected has none."""
    # No codes are read, so the number of codebooks does not matter.
    return any(ShardFile(path, num_codebooks=1).group_starts[-1] for path in list_shards(out))


def check_recordings(part: Sequence[ManifestRow], root: Path) -> tuple[str, list[Rejection]]:
    """Find a shard's recordings without reading them.

    Returns:
        A fingerprint, which changes with the rows and with the size or modification time of any of their
        audio files, and rejections of the rows that have a missing or unusable file.
    """
    digest = hashlib.sha256()
    missing: list[Rejection] = []
    for row in part:
        digest.update(row.canonical().encode())
        reasons: list[str] = []
        for place, name in enumerate(row.audio):
            try:
                stat = locate(root, name).stat()
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except (DataError, OSError) as problem:
                state = "unusable"
                reasons.append(reason_of(row.audio, place, problem))
            digest.update(f"\0{state}\0".encode())
        if reasons:
            missing.append(Rejection(row.number, row.id, row.audio[0], reasons[0]))
    return digest.hexdigest(), missing


def read_record(
    out: Path, index: int, fingerprint: str, part: Sequence[ManifestRow], root: Path
) -> list[Rejection] | None:
    """Return the rejections of a finished shard, or None if the shard has to be encoded."""
    path = _record_path(out, index)
    if not (path.is_file() and shard_path(out, index).is_file()):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete it and run again.") from None
    rejected = [Rejection(**fields) for fields in record["rejected"]]
    if record["fingerprint"] != fingerprint or _can_be_retried(rejected, part, root):
        return None
    return rejected


def write_record(out: Path, index: int, fingerprint: str, rejected: Sequence[Rejection]) -> None:
    """Record that a shard is done."""
    path = _record_path(out, index)
    with writing(path):
        write_json(path, {"fingerprint": fingerprint, "rejected": list(map(asdict, rejected))})


def _record_path(out: Path, index: int) -> Path:
    return shard_path(out, index).with_suffix(".json")


def _can_be_retried(rejected: Sequence[Rejection], part: Sequence[ManifestRow], root: Path) -> bool:
    """Whether any row that was rejected because a file could not be opened has only readable files now."""
    rows = {row.number: row for row in part}
    return any(
        all(can_be_opened(root, name) for name in rows[rejection.row].audio)
        for rejection in rejected
        if may_be_temporary(rejection.reason)
    )
