"""From a manifest to a dataset folder: recordings become codes, shard by shard.

A shard is a contiguous range of the manifest. It is done when its Parquet file and its record stand
side by side; the record holds a fingerprint of the rows and of the audio files, so that a run that is
started again does what is missing or has changed, and nothing else. `dataset.json` is written last:
without it the folder is no dataset.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from higgs_tune.data.audio import locate, read_clip
from higgs_tune.data.codec import Codec, encode_clip, load_codec
from higgs_tune.data.files import write_json, write_json_lines
from higgs_tune.data.manifest import Manifest, read_manifest
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.progress import progress
from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.data.shards import (
    INFO_NAME,
    CodecFacts,
    DatasetInfo,
    Row,
    finish_dataset,
    list_shards,
    shard_path,
    write_shard,
)
from higgs_tune.data.splits import GIVEN, assign_splits, shared_texts
from higgs_tune.errors import DataError

JOB_NAME = "prepare.json"
REJECTED_NAME = "rejected.jsonl"
_NUM_SHOWN = 3  # rejections quoted in an error
_CACHED_CLIPS = 64  # a reference recording often serves many rows

logger = logging.getLogger(__name__)

ClipCodes = Callable[[str], np.ndarray]


def prepare(
    manifest: Path,
    out: Path,
    *,
    codec: str = "embedded",
    codec_revision: str | None = None,
    device: str = "cpu",
    data_root: Path | None = None,
    options: PrepareOptions | None = None,
) -> DatasetInfo:
    """Encode what `manifest` lists into the dataset folder `out`, or go on where a run stopped.

    Args:
        codec: "embedded", a folder, or a Hub id with `codec_revision`.
        data_root: audio outside it is rejected; the manifest's folder by default.

    Raises:
        DataError: unreadable manifest, more rejected rows than `max_rejected` (all of them are then in
            rejected.jsonl), `out` belongs to other data, or it cannot be written. Finished shards stay.
        ModelError: the codec cannot be loaded.
    """
    options = options or PrepareOptions()
    if data_root is not None and not data_root.is_dir():
        raise DataError(f"{data_root}: no such folder. --data-root is where the recordings are.")
    root = (data_root or manifest.parent).resolve()
    found = read_manifest(manifest, root, options.max_text_chars, options.clips_from_chat)
    model = load_codec(codec, device, codec_revision)
    facts = codec_facts(model, codec)
    _claim(out, _job(found, facts, model, options))
    rejected = list(found.rejected)
    _check_rejected(manifest, out, rejected, [], found.num_total, options)
    rows, left_out, split_rule = assign_splits(found.rows, options.val_fraction, options.seed)
    if split_rule == GIVEN and (num_shared := shared_texts(rows)):
        logger.warning(
            "%s: %d texts are in both splits, as its split column says", manifest, num_shared
        )

    def clip_codes(name: str) -> np.ndarray:
        wave, rate_hz = read_clip(
            locate(root, name),
            min_seconds=options.min_seconds,
            max_seconds=options.max_seconds,
            target_rate_hz=facts.sample_rate_hz,
        )
        return encode_clip(model, wave, rate_hz)

    rejected += _encode_shards(
        rows, out, root, facts, lru_cache(maxsize=_CACHED_CLIPS)(clip_codes), options.rows_per_shard
    )
    _check_rejected(manifest, out, rejected, left_out, found.num_total, options)
    info = finish_dataset(
        out, facts, num_rejected=len(rejected) + len(left_out), split_rule=split_rule
    )
    for split, count in info.splits.items():
        if not count:
            logger.warning("%s: the %s split is empty (%s)", out, split, split_rule)
    return info


def codec_facts(codec: Codec, name: str) -> CodecFacts:
    """What a dataset says about `codec`; `name` is "embedded", a folder or a Hub id."""
    config = codec.config
    return CodecFacts(
        id=Path(name).resolve().name if Path(name).is_dir() else name,
        sample_rate_hz=config.sample_rate,
        frame_rate_hz=float(config.sample_rate / config.hop_length),
        num_codebooks=config.num_quantizers,
        codebook_size=config.codebook_size,
    )


def encode_row(row: ManifestRow, clip_codes: ClipCodes) -> Row:
    """A dataset row; DataError says why its audio cannot be used."""
    assert row.split in ("train", "validation"), row.split
    return Row(
        id=row.id,
        split=row.split,
        kind=row.kind,
        speaker=row.speaker,
        text=row.text,
        codes=tuple(clip_codes(name) for name in row.audio),
        language=row.language,
        ref_text=row.ref_text,
        turns=row.turns,
        start_index=row.start_index,
    )


def _encode_shards(
    rows: Sequence[ManifestRow],
    out: Path,
    root: Path,
    facts: CodecFacts,
    clip_codes: ClipCodes,
    rows_per_shard: int,
) -> list[Rejection]:
    """Write the shards that are missing or stale; return the rejections of all."""
    parts = [rows[start : start + rows_per_shard] for start in range(0, len(rows), rows_per_shard)]
    records = [_read_record(out, index, part, root) for index, part in enumerate(parts)]
    to_do = [index for index, record in enumerate(records) if record is None]
    if to_do:
        (out / INFO_NAME).unlink(missing_ok=True)
    num_rows = sum(len(parts[index]) for index in to_do)
    title = f"encode ({len(rows) - num_rows} of {len(rows)} rows were done before)"
    with progress(title if num_rows < len(rows) else "encode", num_rows) as advance:
        for index in to_do:
            # Before the audio is read: a file that changes meanwhile makes the record stale.
            fingerprint = _fingerprint(parts[index], root)
            encoded: list[Row] = []
            rejected: list[Rejection] = []
            for row in parts[index]:
                try:
                    encoded.append(encode_row(row, clip_codes))
                except DataError as problem:
                    rejected.append(Rejection(row.number, row.id, row.audio[0], str(problem)))
                advance(1)
            write_shard(shard_path(out, index), encoded, facts)
            records[index] = [asdict(rejection) for rejection in rejected]
            write_json(
                _record_path(out, index), {"fingerprint": fingerprint, "rejected": records[index]}
            )
    return [Rejection(**fields) for record in records for fields in record or []]


def _record_path(out: Path, index: int) -> Path:
    return shard_path(out, index).with_suffix(".json")


def _read_record(
    out: Path, index: int, part: Sequence[ManifestRow], root: Path
) -> list[dict[str, Any]] | None:
    """The rejections of a finished shard; None if it has to be encoded."""
    path = _record_path(out, index)
    if not (path.is_file() and shard_path(out, index).is_file()):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete it and run again.") from None
    return record["rejected"] if record["fingerprint"] == _fingerprint(part, root) else None


def _fingerprint(part: Sequence[ManifestRow], root: Path) -> str:
    """Changes with the rows and with the size or time of any of their audio files."""
    digest = hashlib.sha256()
    for row in part:
        digest.update(row.canonical().encode())
        for name in row.audio:
            try:
                stat = locate(root, name).stat()
                state = f"{stat.st_size} {stat.st_mtime_ns}"
            except (DataError, OSError):
                state = "unusable"
            digest.update(f"\0{state}\0".encode())
    return digest.hexdigest()


def _job(
    manifest: Manifest, facts: CodecFacts, codec: Codec, options: PrepareOptions
) -> dict[str, Any]:
    """What decides the content of the dataset, audio files apart."""
    content = hashlib.sha256()
    for row in manifest.rows:
        content.update(row.canonical().encode() + b"\0")
    for rejection in manifest.rejected:
        content.update(json.dumps(asdict(rejection), sort_keys=True).encode() + b"\0")
    weights = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        plain = tensor.detach().cpu().contiguous().flatten()
        weights.update(name.encode() + plain.view(torch.uint8).numpy().tobytes())
    return {
        **options.model_dump(mode="json", exclude={"max_rejected"}),
        "codec": asdict(facts) | {"weights_sha256": weights.hexdigest()},
        "manifest rows": content.hexdigest(),
    }


def _claim(out: Path, job: dict[str, Any]) -> None:
    """Take `out` for this job, or see that it already is this job's.

    Raises:
        DataError: other data was prepared there; nothing is touched.
    """
    path = out / JOB_NAME
    advice = "Give another --out, or delete the folder to prepare it anew."
    if not path.is_file():
        if (out / INFO_NAME).exists() or list_shards(out):
            raise DataError(f"{out}: holds a dataset that this command did not make. {advice}")
        write_json(path, job)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {advice}") from None
    changed = sorted(name for name in job if before.get(name) != job[name])
    if changed:
        raise DataError(
            f"{out}: was prepared from something else: {', '.join(changed)} changed since. {advice}"
        )
    for half_written in out.rglob("*.tmp"):  # of a run that was killed
        half_written.unlink()


def _check_rejected(
    manifest: Path,
    out: Path,
    rejected: Sequence[Rejection],
    left_out: Sequence[Rejection],
    num_total: int,
    options: PrepareOptions,
) -> None:
    """List what is rejected; DataError if it is more than `max_rejected`, or everything."""
    listed = sorted([*rejected, *left_out], key=lambda rejection: rejection.row)
    write_json_lines(out / REJECTED_NAME, [asdict(rejection) for rejection in listed])
    allowed = options.allowed(num_total)
    if len(rejected) <= allowed and len(listed) < num_total:
        return
    (out / INFO_NAME).unlink(missing_ok=True)
    first = "; ".join(f"row {some.row}: {some.reason}" for some in rejected[:_NUM_SHOWN])
    raise DataError(
        f"{manifest}: {len(rejected)} of {num_total} rows are rejected, {allowed} are allowed "
        f"(max_rejected {options.max_rejected:g}). First {first}. All are in {out / REJECTED_NAME}. "
        "Mend them, or raise --max-rejected; what is encoded is kept."
    )
