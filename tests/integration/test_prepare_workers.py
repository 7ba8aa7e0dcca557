"""`data prepare` on a Ray Data pool: the same bytes as in one process, even if processes die."""

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from higgs_tune.data import encode_ray
from higgs_tune.data.clips import ClipRules
from higgs_tune.data.codec import load_codec, weights_digest
from higgs_tune.data.encode import prepare
from higgs_tune.data.encode_ray import CodecSource, encode_on_cluster
from higgs_tune.data.options import PrepareOptions
from higgs_tune.errors import ModelError
from tests import forks
from tests.codecs import save_tiny_higgs_codec
from tests.integration.conftest import Start

pytestmark = pytest.mark.integration
RATE_HZ = 24_000
ROWS_PER_SHARD = 7


@pytest.fixture(scope="module")
def ray_with_torch(local_ray: None) -> None:
    """A Ray whose next workers start with torch imported: saves 12 s of CPU time for each actor."""
    forks.ask(modules=["higgs_tune.data.clips", "higgs_tune.data.codec", "transformers"])


@pytest.fixture(scope="module")
def codec_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_higgs_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 recordings of 0.5 to 4 s, every fifth row with a reference, one recording damaged."""
    root = tmp_path_factory.mktemp("root")
    rng = np.random.default_rng(0)
    lines = []
    for n in range(60):
        wave = rng.normal(0, 0.1, int(rng.uniform(0.5, 4) * RATE_HZ)).astype(np.float32)
        soundfile.write(root / f"{n}.wav", wave, RATE_HZ)
        row = {"id": f"c{n}", "path": f"{n}.wav", "text": f"text {n}", "speaker": "s"}
        if n % 5 == 0:
            row |= {"ref_audio": "3.wav", "ref_text": "text 3"}
        lines.append(row)
    (root / "17.wav").write_bytes(b"damaged")
    (root / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root / "m.jsonl"


def run(manifest: Path, out: Path, codec: Path, num_workers: int) -> Any:
    options = PrepareOptions(rows_per_shard=ROWS_PER_SHARD)
    return prepare(manifest, out, codec=str(codec), num_workers=num_workers, options=options)


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(manifest: Path, codec_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the manifest without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    info = run(manifest, out, codec_folder, num_workers=1)
    assert (info.num_rows, info.num_rejected) == (59, 1)
    return out


def descendants(named: str, pid: int | None = None) -> list[psutil.Process]:
    """Processes below this one, or below `pid`, whose command line contains `named`."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if named in "".join(child.cmdline())]


def test_a_pool_whose_actors_die_gives_the_same_bytes_as_one_process(
    ray_with_torch, manifest, codec_folder, whole, tmp_path, monkeypatch
):

    def on_two_actors(codec, rules, rows):
        source = CodecSource(
            str(codec_folder), None, weights_digest(codec), codec.config.num_quantizers
        )
        outcomes = encode_on_cluster(source, rules, rows, num_workers=2, device="cpu")
        yield next(outcomes)
        victims = descendants("MapWorker")
        assert len(victims) == 2
        for victim in victims:  # at least one is working on a block
            victim.kill()
        yield from outcomes

    monkeypatch.setattr("higgs_tune.data.encode.encode_here", on_two_actors)
    monkeypatch.setattr(encode_ray, "_STREAM_ROWS", 40)
    run(manifest, tmp_path / "out", codec_folder, num_workers=1)
    assert content(tmp_path / "out") == content(whole)


def test_a_closed_stream_leaves_no_thread_that_calls_ray(
    ray_with_torch, manifest, codec_folder, monkeypatch
):
    """If Ray is gone, such a thread ends the process with 1 before its last message is complete.

    After Ctrl-C on a busy machine, Ray's own wait of two seconds is too short; here it is skipped.
    """

    def join(self, timeout=None):
        if timeout != 2:
            threading.Thread.join(self, timeout)

    monkeypatch.setattr(StreamingExecutor, "join", join)
    source = CodecSource(str(codec_folder), None, weights_digest(load_codec(str(codec_folder))), 8)
    rules = ClipRules(manifest.parent, 0.1, 30)
    names = [(f"{n}.wav",) for n in range(60)]
    before = set(threading.enumerate())
    outcomes = encode_on_cluster(source, rules, names, num_workers=1, device="cpu")
    next(outcomes)
    outcomes.close()
    names_left = {thread.name for thread in set(threading.enumerate()) - before}
    assert names_left <= {"Prefetcher"}  # it sleeps for ever and asks Ray for nothing


def test_an_actor_with_another_codec_is_refused(ray_with_torch, manifest, codec_folder):
    source = CodecSource(str(codec_folder), None, "0" * 64, 8)
    outcomes = encode_on_cluster(
        source, ClipRules(manifest.parent, 0.1, 30), [("0.wav",)], num_workers=1, device="cpu"
    )
    with pytest.raises(ModelError, match="has other weights on"):
        next(outcomes)


@pytest.fixture
def start(manifest: Path, codec_folder: Path, tmp_path: Path, start_process: Start) -> Start:
    """Starts the command."""
    words = ["data", "prepare", str(manifest), "--out", str(tmp_path / "out")]
    words += [
        "--codec",
        str(codec_folder),
        "--workers",
        "2",
        "--rows-per-shard",
        str(ROWS_PER_SHARD),
    ]
    return lambda: start_process(sys.executable, "-m", "higgs_tune.cli", *words)


def wait_until(condition: Callable[[], Any], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_is_interrupted_and_then_killed_can_be_continued(
    start, whole, manifest, codec_folder, tmp_path, capsys
):
    shards = tmp_path / "out" / "shards"
    done: dict[Path, int] = {}
    for number, how in ((1, signal.SIGINT), (4, signal.SIGKILL)):
        process = start()
        record = shards / f"part-{number:05d}.json"
        wait_until(lambda p=process, r=record: r.exists() or p.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGSTOP)  # else it could end while its actors are looked up
        workers = descendants("MapWorker", process.pid)
        assert len(workers) == 2
        assert not descendants("ray-dashboard", process.pid)  # seconds of CPU time for nothing
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        printed = process.communicate(timeout=60)[0]
        if how == signal.SIGINT:
            assert process.returncode == 130, printed
            assert printed.splitlines()[-1].startswith("interrupted; the same command continues")
            assert "Traceback" not in printed
            assert "Warning" not in printed
        wait_until(lambda w=workers: not any(is_alive(worker) for worker in w))
        before = done
        done = {path: path.stat().st_mtime_ns for path in shards.glob("*.json")}
        assert number < len(done) < 9, "it was not stopped halfway"
        assert before.items() <= done.items(), "what was done is not done again"
    run(manifest, tmp_path / "out", codec_folder, num_workers=1)
    assert re.search(r"\d+ of 60 rows were done before", capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert content(tmp_path / "out") == content(whole)


def test_workers_and_devices_that_this_machine_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(encode_ray.ray, "cluster_resources", lambda: {"CPU": 2.0})
    own = encode_ray.Cluster(is_own=True, complete=str)
    with pytest.raises(encode_ray.ConfigError, match=r"--workers 3: this machine has 2 CPUs"):
        encode_ray._gpu_share(own, 3, "auto")
    with pytest.raises(encode_ray.ConfigError, match="--device cuda: Ray finds no GPU"):
        encode_ray._gpu_share(own, 2, "cuda")
    with pytest.raises(encode_ray.ConfigError, match="Set CUDA_VISIBLE_DEVICES to choose"):
        encode_ray._gpu_share(own, 2, "cuda:1")
    joined = encode_ray.Cluster(is_own=False, complete=str)
    assert encode_ray._gpu_share(joined, 2, "cuda") == 1  # its machines are added on demand


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "device", "share"),
    [
        (2, 0, "auto", 0),
        (2, 4, "auto", 1),
        (4, 2, "auto", 0.5),
        (3, 2, "cuda", 0.5),
        (9, 2, "cpu", 0),
    ],
)
def test_workers_share_the_gpus_evenly(monkeypatch, num_workers, num_gpus, device, share):
    resources = {"CPU": 16.0} | ({"GPU": num_gpus} if num_gpus else {})
    monkeypatch.setattr(encode_ray.ray, "cluster_resources", lambda: resources)
    assert (
        encode_ray._gpu_share(encode_ray.Cluster(is_own=True, complete=str), num_workers, device)
        == share
    )
