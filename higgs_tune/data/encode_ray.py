"""Encode on several processes or GPUs with Ray Data; only this module of `data` uses Ray.

Light rows (the names of recordings) stream through a pool of actors that hold a codec each; codes come
back in the rows' order. Memory does not grow with the number of rows: it holds a clip per actor, the codes
of the blocks in progress, and the names of one stream.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch

from higgs_tune.cluster import ENVIRONMENT, Cluster, join_cluster
from higgs_tune.data.clips import ClipRules, Names, Outcome, clip_encoder
from higgs_tune.data.codec import load_codec, weights_digest
from higgs_tune.errors import ConfigError, ModelError, NoMemoryError

_MAX_BLOCK_ROWS = 32  # encoded by one actor at a time, and again if that actor dies
_BLOCKS_PER_WORKER = 8  # at least, so that the actors finish at about the same time
# Rows of one stream. Each stream starts new actors, which costs seconds per several days of audio.
_STREAM_ROWS = 2**17
_MAX_RETRIES = 3  # of a block whose actor died
_RAY_DATA_THREADS = ("StreamingExecutor-", "iter_threaded", "map_tp_")
_ENVIRONMENT = ENVIRONMENT | {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else Ray's core prints a warning about each of its own pools
}

_RESULT = pa.schema(
    [
        pa.field("index", pa.int64()),
        pa.field("problem", pa.string()),
        pa.field("num_frames", pa.list_(pa.int64())),
        pa.field("codes", pa.binary()),
        pa.field("fatal", pa.string()),  # an error as text, because Ray drops an exception's cause
    ]
)


@dataclass(frozen=True)
class CodecSource:
    """The codec that every actor loads for itself."""

    path: str
    revision: str | None
    weights_sha256: str
    num_codebooks: int


class _Encoder:
    """Ray actor that encodes blocks of rows."""

    def __init__(self, source: CodecSource, rules: ClipRules, device: str) -> None:
        self._source, self._rules, self._device = source, rules, device
        self._code: Callable[[Names], Outcome] | None = None

    def _load(self) -> Callable[[Names], Outcome]:
        """Load the codec. Not done in __init__, whose errors Ray retries and then hides."""
        torch.set_num_threads(1)  # as in a single process, see clips.one_thread
        source = self._source
        codec = load_codec(source.path, self._device, source.revision)
        if weights_digest(codec) != source.weights_sha256:
            raise ModelError(
                f"codec {source.path}: has other weights on {ray.util.get_node_ip_address()} than on "
                "the machine that started the command. Give all machines the same folder."
            )
        return clip_encoder(codec, self._rules)

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            code = self._code = self._code or self._load()
            outcomes = [code(tuple(row["names"])) for row in block.to_pylist()]
        except (ModelError, NoMemoryError) as error:
            return pa.Table.from_pylist([{"fatal": str(error)}], schema=_RESULT)
        rows: list[dict[str, Any]] = []
        for index, found in zip(block.column("index").to_pylist(), outcomes, strict=True):
            rows.append({"index": index})
            if isinstance(found, str):
                rows[-1]["problem"] = found
            else:
                rows[-1]["num_frames"] = [len(codes_TC) for codes_TC in found]
                rows[-1]["codes"] = b"".join(codes_TC.tobytes() for codes_TC in found)
        return pa.Table.from_pylist(rows, schema=_RESULT)


def encode_on_cluster(
    source: CodecSource, rules: ClipRules, rows: Iterable[Names], *, num_workers: int, device: str
) -> Generator[Outcome, None, None]:
    """Encode `rows` on `num_workers` actors, yielding outcomes in the rows' order.

    An actor that dies is replaced and its block encoded again, up to `_MAX_RETRIES` times. Closing the
    iterator shuts Ray down if it was started here.

    Args:
        device: "auto" uses the cluster's GPUs if it has any; workers share them evenly.

    Raises:
        ConfigError: more workers than this machine has CPUs, or a GPU is asked for and there is none.
        ModelError: an actor cannot load the codec, loads other weights, or has no memory for a clip.
    """
    with join_cluster(_ENVIRONMENT) as cluster:
        num_gpus = _gpu_share(cluster, num_workers, device)
        _silence_ray_data()
        rest = iter(rows)
        while names := list(islice(rest, _STREAM_ROWS)):
            yield from _stream(source, rules, names, num_workers, num_gpus)


def _stream(
    source: CodecSource, rules: ClipRules, rows: list[Names], num_workers: int, num_gpus: float
) -> Generator[Outcome, None, None]:
    """Encode some rows; Ray keeps the names of all of them until the last is encoded."""
    size = max(1, min(_MAX_BLOCK_ROWS, len(rows) // (num_workers * _BLOCKS_PER_WORKER)))
    items = [{"index": n, "names": list(names)} for n, names in enumerate(rows)]
    data = ray.data.from_items(items, override_num_blocks=-(-len(rows) // size))
    data.context.execution_options.preserve_order = True
    data = data.map_batches(
        _Encoder,
        fn_constructor_args=(source, rules, "cuda" if num_gpus else "cpu"),
        batch_size=size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        max_task_retries=_MAX_RETRIES,
        num_gpus=num_gpus or None,
        num_cpus=None if num_gpus else 1,
    )
    expected = 0
    # no prefetching: its thread never ends
    batches = data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    blocks: Any = iter(batches)
    try:
        for block in blocks:
            for row in block.to_pylist():
                if row["fatal"]:
                    raise ModelError(row["fatal"])
                assert row["index"] == expected, (row["index"], expected)
                expected += 1
                yield _outcome(row, source.num_codebooks)
    finally:
        blocks.close()
        _wait_for_threads()
    assert expected == len(rows), (expected, len(rows))


def _wait_for_threads() -> None:
    """Wait for Ray Data's threads to end; Ray Data itself waits only two seconds.

    A thread that calls Ray after its shutdown would kill this process at once, with exit code 1.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(_RAY_DATA_THREADS):
            thread.join(timeout=30)


def _outcome(row: dict[str, Any], num_codebooks: int) -> Outcome:
    if row["problem"] is not None:
        return row["problem"]
    flat = np.frombuffer(row["codes"], dtype=np.uint16).reshape(-1, num_codebooks)
    return tuple(np.split(flat, np.cumsum(row["num_frames"])[:-1]))


def _gpu_share(cluster: Cluster, num_workers: int, device: str) -> float:
    """GPUs per worker; 0 means the CPU."""
    total = ray.cluster_resources()
    num_gpus, num_cpus = total.get("GPU", 0), total.get("CPU", 0)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {device}: needed auto, cpu or cuda, because --workers {num_workers} share the "
            "GPUs. Set CUDA_VISIBLE_DEVICES to choose among them."
        )
    if device == "cuda" and not num_gpus:
        if cluster.is_own:
            raise ConfigError("--device cuda: Ray finds no GPU. Use auto or cpu.")
        return 1.0  # an autoscaler may add machines with GPUs when workers ask for them
    if device != "cpu" and num_gpus:
        if num_workers <= num_gpus:
            return 1.0
        return 1 / -(-num_workers // int(num_gpus))
    if cluster.is_own and num_workers > num_cpus:
        raise ConfigError(
            f"--workers {num_workers}: this machine has {num_cpus:g} CPUs, and a worker keeps one "
            "busy. Lower it."
        )
    return 0.0


def _silence_ray_data() -> None:
    """Silence Ray Data's progress and logs, which our own progress replaces."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # max_task_retries can only be passed in this way so far
    warnings.filterwarnings(
        "ignore", "`ray_remote_args` is deprecated", category=DeprecationWarning
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
