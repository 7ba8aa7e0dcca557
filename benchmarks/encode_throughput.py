"""Hours of audio that `higgs-tune data prepare` encodes per hour: 1 against 2 workers.

    python benchmarks/encode_throughput.py [--codec embedded|tiny-higgs|FOLDER] [--clips 120] [--repeats 3]
                                           [--out results/encode_throughput.json]

Encodes the same clips with both settings in turn, checks that the datasets are equal, and reports medians and
their ratio. "tiny-higgs" is HiggsAudioV2TokenizerModel with few, random weights: the real code path, not the
real cost. `steady` is the rate of a long run: it leaves out the time before the first encoded clip (Ray and
imports: seconds, once). With more workers, a few more clips are done by then, so use many clips.
`peak_rss_mib` is the largest total of this process and its descendants; shared pages count more than once.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import soundfile
from options import at_least, json_file, run
from output import machine, save, settings_of
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_tune.data import encode
from higgs_tune.data.options import PrepareOptions
from higgs_tune.device import resolve_device

RATE_HZ = 24_000


def tiny_higgs(folder: Path) -> str:
    """Save a codec of the real class with random weights; returns its folder."""
    ratios = [8, 5, 4, 2, 3]
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=(0.5, 1, 1.5, 2),
        acoustic_model_config={
            "model_type": "dac",
            "encoder_hidden_size": 16,
            "downsampling_ratios": ratios,
            "decoder_hidden_size": 64,
            "upsampling_ratios": ratios,
            "hidden_size": 64,
        },
        semantic_model_config={
            "model_type": "hubert",
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "conv_dim": [96] * 7,
        },
    )
    codec = HiggsAudioV2TokenizerModel(config)
    for name, buffer in codec.named_buffers():
        if name.endswith("codebook.embed"):  # they start at zero
            buffer.normal_()
    codec.save_pretrained(folder)
    return str(folder)


def write_clips(folder: Path, count: int) -> tuple[Path, float]:
    """Write noise clips of 5 to 15 s and their manifest; returns the manifest and the hours of audio."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    seconds = rng.uniform(5, 15, count)
    lines = []
    for n, length in enumerate(seconds):
        wave = rng.normal(0, 0.1, int(length * RATE_HZ)).astype(np.float32)
        soundfile.write(folder / f"{n}.wav", wave, RATE_HZ)
        lines.append(json.dumps({"path": f"{n}.wav", "text": f"text {n}"}))
    manifest = folder / "m.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, float(seconds.sum()) / 3600


class PeakRss:
    """The largest resident size of this process and its descendants, sampled every 0.5 s."""

    def __enter__(self) -> "PeakRss":
        self.mib = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.mib = max(self.mib, total / 2**20)


class Timed(NamedTuple):
    """One preparation: seconds in total, seconds after the first clip, and the dataset's hash."""

    whole_s: float
    steady_s: float
    content_hash: str


def timed(run: Callable[[], encode.DatasetInfo]) -> Timed:
    """Prepare a dataset and measure the time."""
    first: list[float] = []
    show = encode.progress

    @contextmanager
    def stamped(title: str, total: int) -> Iterator[encode.Advance]:
        with show(title, total) as advance:

            def noted(num_rows: int) -> None:
                first.append(time.perf_counter())
                advance(num_rows)

            yield noted

    encode.progress = stamped
    try:
        started = time.perf_counter()
        info = run()
        ended = time.perf_counter()
    finally:
        encode.progress = show
    return Timed(ended - started, ended - first[0], info.content_hash)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codec", default="embedded")
    parser.add_argument("--clips", type=at_least(1), default=120)
    parser.add_argument("--workers", type=at_least(1), nargs=2, default=[1, 2])
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=json_file)
    args = parser.parse_args()
    os.environ.setdefault("RAY_ADDRESS", "local")
    facts = machine(resolve_device(args.device, "--device"))
    found: dict[int, list[Timed]] = {n: [] for n in args.workers}
    peaks = dict.fromkeys(args.workers, 0.0)
    with tempfile.TemporaryDirectory(prefix="ht") as name:
        folder = Path(name)
        codec = tiny_higgs(folder / "codec") if args.codec == "tiny-higgs" else args.codec
        manifest, hours = write_clips(folder / "root", args.clips)
        for repeat in range(args.repeats):
            for workers in args.workers:
                out = folder / f"out-{workers}-{repeat}"
                with PeakRss() as rss:
                    found[workers].append(
                        timed(
                            lambda out=out, workers=workers: encode.prepare(
                                manifest,
                                out,
                                codec=codec,
                                device=args.device,
                                num_workers=workers,
                                options=PrepareOptions(rows_per_shard=16),
                            )
                        )
                    )
                peaks[workers] = max(peaks[workers], rss.mib)
    hashes = {each.content_hash for runs in found.values() for each in runs}
    assert len(hashes) == 1, "different numbers of workers give different datasets"
    one, two = args.workers
    result = {"codec": args.codec, "hours_of_audio": round(hours, 4)}
    for name in ("whole", "steady"):
        rate = {
            n: hours * 3600 / statistics.median(getattr(each, f"{name}_s") for each in found[n])
            for n in found
        }
        result |= {f"{name}_hours_per_hour_{n}": round(rate[n], 1) for n in rate}
        result[f"{name}_ratio"] = round(rate[two] / rate[one], 2)
    result |= {f"peak_rss_mib_{n}": round(peak) for n, peak in peaks.items()}
    result |= {
        "every_s": {n: [[each.whole_s, each.steady_s] for each in found[n]] for n in found},
        "machine": facts,
        "settings": settings_of(args),
    }
    print(json.dumps(result, indent=1))
    save(args.out, result)


if __name__ == "__main__":
    run(main)
