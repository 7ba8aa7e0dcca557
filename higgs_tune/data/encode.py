"""Turn a manifest into a dataset folder by encoding its recordings, shard by shard.

A shard is a contiguous range of the manifest. It is done when both its Parquet file and its record exist.
The record holds a fingerprint of the rows and their audio files, so that a restarted run encodes only what
is missing or has changed. Codes come from this process or from a Ray Data pool, always in the order of the
manifest; only this process writes. `dataset.json` is written last: without it the folder is not a dataset.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higgs_tune.data.clips import ClipRules, Names, Outcome, encode_here
from higgs_tune.data.codec import Codec, load_codec, weights_digest
from higgs_tune.data.files import writing
from higgs_tune.data.manifest import open_manifest
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.plain_text import is_utf8
from higgs_tune.data.progress import Advance, progress
from higgs_tune.data.restart import (
    check_recordings,
    claim_folder,
    drop_shards,
    holds_rows,
    read_record,
    write_record,
)
from higgs_tune.data.row_table import RowTable, Stage
from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.data.shards import (
    INFO_NAME,
    CodecFacts,
    DatasetInfo,
    Row,
    finish_dataset,
    shard_path,
    write_shard,
)
from higgs_tune.data.splits import divide
from higgs_tune.device import resolve_device
from higgs_tune.errors import DataError
from higgs_tune.files import write_json_lines

REJECTED_NAME = "rejected.jsonl"
_NUM_SHOWN = 3  # rejections quoted in an error

logger = logging.getLogger(__name__)


def prepare(
    manifest: Path,
    out: Path,
    *,
    codec: str = "embedded",
    codec_revision: str | None = None,
    device: str = "auto",
    num_workers: int = 1,
    data_root: Path | None = None,
    options: PrepareOptions | None = None,
) -> DatasetInfo:
    """Encode the recordings of `manifest` into the dataset folder `out`, or continue a stopped run.

    Equal manifests, recordings, codecs and options give equal bytes for any `num_workers`.

    Args:
        codec: "embedded", a folder, or a Hub id with `codec_revision`.
        device: "auto", "cpu", "cuda", or "cuda:N" with one worker.
        num_workers: 1 encodes in this process; more are the actors of a Ray Data pool.
        data_root: audio outside it is rejected; by default the manifest's folder.

    Raises:
        DataError: the data root does not exist, a folder's name is not UTF-8, the manifest is unreadable or
            cannot be split, all rows or more than `max_rejected` allows are rejected (rejected.jsonl lists
            them), or `out` belongs to other data or cannot be written. Finished shards are kept.
        ModelError: the codec cannot be loaded.
        NoMemoryError: the device has no memory for the codec or a clip (a ModelError if a worker's).
        ConfigError: no such device, or more workers than this machine has CPUs.
    """
    options = options or PrepareOptions()
    if data_root is not None and not data_root.is_dir():
        raise DataError(f"{data_root}: no such folder. --data-root is where the recordings are.")
    root = (data_root or manifest.parent).resolve()
    for folder in (root, out):
        if not is_utf8(str(folder)):
            raise DataError(f"{str(folder)!r}: this name is not UTF-8. Rename the folder.")
    # With more workers this process encodes nothing, and they may have other devices than it has.
    model = load_codec(
        codec, resolve_device(device, "--device") if num_workers == 1 else "cpu", codec_revision
    )
    facts = codec_facts(model, codec)
    rules = ClipRules(root, options.min_seconds, options.max_seconds)

    def code(names: Iterable[Names]) -> Generator[Outcome, None, None]:
        if num_workers == 1:
            return encode_here(model, rules, names)
        # pandas and Ray: seconds to import
        from higgs_tune.data.encode_ray import CodecSource, encode_on_cluster

        assert facts.weights_sha256 is not None
        source = CodecSource(codec, codec_revision, facts.weights_sha256, facts.num_codebooks)
        return encode_on_cluster(source, rules, names, num_workers=num_workers, device=device)

    with open_manifest(manifest, root, options.max_text_chars, options.clips_from_chat) as table:
        num_total = table.num_rows + table.num_rejected()
        claim_folder(out, _job(table, facts, options))
        _check_rejected(manifest, out, table, num_total, options)
        split_rule = divide(table, manifest, root, options.val_fraction, options.seed)
        to_do = _to_do(table, out, root, options.rows_per_shard)
        _check_rejected(manifest, out, table, num_total, options)
        table.forget(Stage.MISSING)
        drop_shards(out, kept=-(-table.num_rows // options.rows_per_shard))
        if to_do:
            _encode_shards(table, to_do, out, facts, code, options.rows_per_shard)
        _check_rejected(manifest, out, table, num_total, options)
        num_rejected = table.num_rejected()
    info = finish_dataset(out, facts, num_rejected=num_rejected, split_rule=split_rule)
    for split, count in info.splits.items():
        if not count:
            logger.warning("%s: the %s split is empty (%s)", out, split, split_rule)
    return info


def codec_facts(codec: Codec, name: str) -> CodecFacts:
    """Return what a dataset records about `codec`; `name` is "embedded", a folder or a Hub id."""
    config = codec.config
    return CodecFacts(
        id=Path(name).resolve().name if Path(name).is_dir() else name,
        sample_rate_hz=config.sample_rate,
        frame_rate_hz=float(config.sample_rate / config.hop_length),
        num_codebooks=config.num_quantizers,
        codebook_size=config.codebook_size,
        revision=getattr(config, "_commit_hash", None),  # of a Hub id
        weights_sha256=weights_digest(codec),
    )


def _to_do(table: RowTable, out: Path, root: Path, rows_per_shard: int) -> dict[int, str]:
    """Return the shards that are missing or stale, each with the fingerprint of its recordings.

    Also records the rejections of finished shards, and in the other shards those of rows whose recordings
    are missing.
    """
    to_do: dict[int, str] = {}
    for index, part in enumerate(table.parts(rows_per_shard)):
        # Taken before the audio is read, so that a file that changes meanwhile makes the record stale.
        fingerprint, missing = check_recordings(part, root)
        rejected = read_record(out, index, fingerprint, part, root)
        if rejected is None:
            to_do[index] = fingerprint
            table.reject(missing, Stage.MISSING)
        else:
            table.reject(rejected, Stage.AUDIO)
    return to_do


def _encode_shards(
    table: RowTable,
    to_do: dict[int, str],
    out: Path,
    facts: CodecFacts,
    code: Callable[[Iterable[Names]], Generator[Outcome, None, None]],
    rows_per_shard: int,
) -> None:
    """Encode and write the shards of `to_do`, and record their rejections."""
    (out / INFO_NAME).unlink(missing_ok=True)

    def parts() -> Iterator[tuple[int, list[ManifestRow]]]:
        return ((n, part) for n, part in enumerate(table.parts(rows_per_shard)) if n in to_do)

    num_rows = table.num_rows
    num_to_do = sum(min(rows_per_shard, num_rows - n * rows_per_shard) for n in to_do)
    title = f"encode ({num_rows - num_to_do} of {num_rows} rows were done before)"
    names = (row.audio for _, part in parts() for row in part)
    with (
        progress(title if num_to_do < num_rows else "encode", num_to_do) as advance,
        closing(code(names)) as outcomes,
    ):
        for index, part in parts():
            rejected = _write_part(shard_path(out, index), part, outcomes, facts, advance)
            write_record(out, index, to_do[index], rejected)
            table.reject(rejected, Stage.AUDIO)


def _write_part(
    path: Path,
    part: Sequence[ManifestRow],
    outcomes: Iterator[Outcome],
    facts: CodecFacts,
    advance: Advance,
) -> list[Rejection]:
    """Write the shard of a part from the next outcomes, and return its rejections."""
    encoded: list[Row] = []
    rejected: list[Rejection] = []
    for row in part:
        found = next(outcomes)
        if isinstance(found, str):
            rejected.append(Rejection(row.number, row.id, row.audio[0], found))
        else:
            plain = asdict(row)
            del plain["number"], plain["audio"]
            encoded.append(Row(codes=found, **plain))
        advance(1)
    write_shard(path, encoded, facts)
    return rejected


def _job(table: RowTable, facts: CodecFacts, options: PrepareOptions) -> dict[str, Any]:
    """Everything that determines the content of the dataset, except the audio files."""
    content = hashlib.sha256()
    for row in table.rows():
        content.update(row.canonical().encode() + b"\0")
    for rejection in table.rejected():
        content.update(json.dumps(asdict(rejection), sort_keys=True).encode() + b"\0")
    return {
        **options.model_dump(mode="json", exclude={"max_rejected"}),
        "codec": asdict(facts),
        "manifest rows": content.hexdigest(),
    }


def _check_rejected(
    manifest: Path, out: Path, table: RowTable, num_total: int, options: PrepareOptions
) -> None:
    """Write rejected.jsonl; raise DataError if all rows or more than `max_rejected` are rejected."""
    with writing(out / REJECTED_NAME):
        write_json_lines(out / REJECTED_NAME, map(asdict, table.rejected()))
    allowed = options.allowed(num_total)
    num_rejected = table.num_rejected(Stage.AUDIO)
    if num_rejected <= allowed and table.num_rejected() < num_total:
        return
    (out / INFO_NAME).unlink(missing_ok=True)
    how = "Fix the manifest or the recordings"
    if holds_rows(out):  # encoded from this manifest: `claim_folder` refuses a changed one
        how = "Fix the recordings (what is encoded is kept), use a new --out for a fixed manifest"
    first = "; ".join(f"row {r.row}: {r.reason}" for r in table.first_rejected(_NUM_SHOWN))
    raise DataError(
        f"{manifest}: {num_rejected} of {num_total} rows are rejected, {allowed} are allowed "
        f"(max_rejected {options.max_rejected:g}). First of each reason: {first}. "
        f"All are in {out / REJECTED_NAME}. {how}, or raise --max-rejected."
    )
