"""From a manifest to a dataset folder: recordings become codes, shard by shard.

A shard is a contiguous range of the manifest. It is done when its Parquet file and its record stand
side by side; the record holds a fingerprint of the rows and of the audio files, so that a run that is
started again does what is missing or has changed, and nothing else. Codes come from this process or
from a Ray Data pool, always in the order of the manifest; only this process writes. `dataset.json` is
written last: without it the folder is no dataset.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from higgs_tune.data.audio import can_be_opened, is_passing, locate
from higgs_tune.data.clips import ClipRules, Names, Outcome, code_here
from higgs_tune.data.codec import Codec, load_codec, weights_digest
from higgs_tune.data.files import writing
from higgs_tune.data.manifest import open_manifest
from higgs_tune.data.options import PrepareOptions
from higgs_tune.data.progress import Advance, progress
from higgs_tune.data.row_table import RowTable, Stage
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
from higgs_tune.data.splits import divide
from higgs_tune.device import resolve_device
from higgs_tune.errors import DataError
from higgs_tune.files import write_json, write_json_lines

JOB_NAME = "prepare.json"
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
    """Encode what `manifest` lists into the dataset folder `out`, or go on where a run stopped.

    Equal manifests, recordings, codecs and options give equal bytes, whatever `num_workers`.

    Args:
        codec: "embedded", a folder, or a Hub id with `codec_revision`.
        device: "auto", "cpu", "cuda", or "cuda:N" with one worker.
        num_workers: 1 codes in this process; more are the actors of a Ray Data pool.
        data_root: audio outside it is rejected; the manifest's folder by default.

    Raises:
        DataError: unreadable manifest, more rejected rows than `max_rejected` (all of them are then in
            rejected.jsonl), `out` belongs to other data, or it cannot be written. Finished shards stay.
        ModelError: the codec cannot be loaded.
        ConfigError: no such device, or more workers than there is room for.
    """
    options = options or PrepareOptions()
    if data_root is not None and not data_root.is_dir():
        raise DataError(f"{data_root}: no such folder. --data-root is where the recordings are.")
    root = (data_root or manifest.parent).resolve()
    # With more workers this process codes nothing, and its device says nothing of theirs.
    model = load_codec(
        codec, resolve_device(device, "--device") if num_workers == 1 else "cpu", codec_revision
    )
    facts = codec_facts(model, codec)
    rules = ClipRules(root, options.min_seconds, options.max_seconds)

    def code(names: Iterable[Names]) -> Generator[Outcome, None, None]:
        if num_workers == 1:
            return code_here(model, rules, names)
        # pandas and Ray: seconds to import
        from higgs_tune.data.encode_ray import CodecSource, code_on_cluster

        assert facts.weights_sha256 is not None
        source = CodecSource(codec, codec_revision, facts.weights_sha256, facts.num_codebooks)
        return code_on_cluster(source, rules, names, num_workers=num_workers, device=device)

    with open_manifest(manifest, root, options.max_text_chars, options.clips_from_chat) as table:
        num_total = table.num_rows + table.num_rejected()
        _claim(out, _job(table, facts, options))
        _check_rejected(manifest, out, table, num_total, options)
        split_rule = divide(table, manifest, root, options.val_fraction, options.seed)
        _encode_shards(table, out, root, facts, code, options.rows_per_shard)
        _check_rejected(manifest, out, table, num_total, options)
        num_rejected = table.num_rejected()
    info = finish_dataset(out, facts, num_rejected=num_rejected, split_rule=split_rule)
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
        revision=getattr(config, "_commit_hash", None),  # of a Hub id
        weights_sha256=weights_digest(codec),
    )


def _encode_shards(
    table: RowTable,
    out: Path,
    root: Path,
    facts: CodecFacts,
    code: Callable[[Iterable[Names]], Generator[Outcome, None, None]],
    rows_per_shard: int,
) -> None:
    """Write the shards that are missing or stale; note the rejections of all."""
    to_do: dict[int, str] = {}
    num_to_do = 0
    for index, part in enumerate(table.parts(rows_per_shard)):
        # Before the audio is read: a file that changes meanwhile makes the record stale.
        fingerprint = _fingerprint(part, root)
        record = _read_record(out, index, fingerprint)
        if record is not None and _is_mended(record, part, root):
            record = None
        if record is None:
            to_do[index] = fingerprint
            num_to_do += len(part)
        else:
            table.reject((Rejection(**fields) for fields in record), Stage.AUDIO)
    if not to_do:
        return
    (out / INFO_NAME).unlink(missing_ok=True)
    num_rows = table.num_rows
    title = f"encode ({num_rows - num_to_do} of {num_rows} rows were done before)"

    def parts() -> Iterator[tuple[int, list[ManifestRow]]]:
        return ((n, part) for n, part in enumerate(table.parts(rows_per_shard)) if n in to_do)

    names = (row.audio for _, part in parts() for row in part)
    with (
        progress(title if num_to_do < num_rows else "encode", num_to_do) as advance,
        closing(code(names)) as outcomes,
    ):
        for index, part in parts():
            rejected = _write_part(shard_path(out, index), part, outcomes, facts, advance)
            record = [asdict(rejection) for rejection in rejected]
            path = _record_path(out, index)
            with writing(path):
                write_json(path, {"fingerprint": to_do[index], "rejected": record})
            table.reject(rejected, Stage.AUDIO)


def _write_part(
    path: Path,
    part: Sequence[ManifestRow],
    outcomes: Iterator[Outcome],
    facts: CodecFacts,
    advance: Advance,
) -> list[Rejection]:
    """Take the part's outcomes, write its shard, return its rejections."""
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


def _record_path(out: Path, index: int) -> Path:
    return shard_path(out, index).with_suffix(".json")


def _read_record(out: Path, index: int, fingerprint: str) -> list[dict[str, Any]] | None:
    """The rejections of a finished shard; None if it has to be encoded."""
    path = _record_path(out, index)
    if not (path.is_file() and shard_path(out, index).is_file()):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete it and run again.") from None
    return record["rejected"] if record["fingerprint"] == fingerprint else None


def _is_mended(rejected: Sequence[dict[str, Any]], part: Sequence[ManifestRow], root: Path) -> bool:
    """Whether recordings that could not be opened then, or on another machine, can be now."""
    rows = {row.number: row for row in part}
    return any(
        all(can_be_opened(root, name) for name in rows[rejection["row"]].audio)
        for rejection in rejected
        if is_passing(rejection["reason"])
    )


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


def _job(table: RowTable, facts: CodecFacts, options: PrepareOptions) -> dict[str, Any]:
    """What decides the content of the dataset, audio files apart."""
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
        with writing(path):
            write_json(path, job)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}). {advice}") from None
    changed = sorted(name for name in job if before.get(name) != job[name])
    if changed and list_shards(out):
        raise DataError(
            f"{out}: was prepared from something else: {', '.join(changed)} changed since. {advice}"
        )
    if changed:  # nothing is encoded yet, so nothing could be mixed up
        with writing(path):
            write_json(path, job)
    for half_written in out.rglob("*.tmp"):  # of a run that was killed
        half_written.unlink()


def _check_rejected(
    manifest: Path, out: Path, table: RowTable, num_total: int, options: PrepareOptions
) -> None:
    """List what is rejected; DataError if it is more than `max_rejected`, or everything."""
    with writing(out / REJECTED_NAME):
        write_json_lines(out / REJECTED_NAME, map(asdict, table.rejected()))
    allowed = options.allowed(num_total)
    num_rejected = table.num_rejected(Stage.AUDIO)
    if num_rejected <= allowed and table.num_rejected() < num_total:
        return
    (out / INFO_NAME).unlink(missing_ok=True)
    how = "Mend the manifest or the recordings"
    if list_shards(out):  # of the manifest as it is: `_claim` refuses another one
        how = "Mend the recordings (what is encoded is kept), give a mended manifest a new --out"
    first = "; ".join(f"row {r.row}: {r.reason}" for r in table.first_rejected(_NUM_SHOWN))
    raise DataError(
        f"{manifest}: {num_rejected} of {num_total} rows are rejected, {allowed} are allowed "
        f"(max_rejected {options.max_rejected:g}). First of each reason: {first}. "
        f"All are in {out / REJECTED_NAME}. {how}, or raise --max-rejected."
    )
