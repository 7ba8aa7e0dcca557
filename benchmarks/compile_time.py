"""Time of a training forward and backward, eager against `base.compile`, and of compiling.

    python benchmarks/compile_time.py [--clips 3] [--repeats 30] [--out results/compile_time.json]

A pack of one trains on the embedded base and clips, with batches of different lengths. Two processes run one
after the other with the same, at first empty, cache folder: the first compiles cold, the second warm. In
each, losses and gradients are compared first; then eager and compiled steps alternate on equal batches.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from options import at_least, json_file, run
from output import machine, save, settings_of
from sides import start_of, synchronise, trial_of
from step_time import alternate, picture

from higgs_tune.config import BaseSettings
from higgs_tune.config_data import TaskMix
from higgs_tune.data.collate import PackBatch, collate, count_targets
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded, encode_conversation
from higgs_tune.model.load import Base, load_base
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import AdapterState, PackLimits


def side(base: Base, rank: int) -> Callable[[list[Encoded]], tuple[torch.Tensor, torch.Tensor]]:
    """A function that runs one adapter's forward and backward; returns its losses and gradient."""
    trial = trial_of(rank, base.model.config.num_codebooks)
    engine = Engine(base, PackLimits.of([trial], num_slots=1))
    weights = start_of(base, rank)
    zeros = {name: torch.zeros(()).expand(weight.shape) for name, weight in weights.items()}
    engine.add("adapter", trial, AdapterState(0, weights, zeros, zeros))

    def step(examples: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        batch: PackBatch = collate({0: examples}).to(engine.device)
        engine.bank.clear_gradients([0])
        counts = {0: count_targets(examples, engine.num_codebooks)}
        text_K, audio_KC = engine.forward_backward(batch, counts)
        return torch.cat([text_K, audio_KC[0]]), engine.bank.lora.grad

    return step


def measure(clips: int, rank: int, repeats: int) -> dict[str, Any]:
    """Compile, compare and time in this process."""
    base = load_base(BaseSettings(compile=True))
    device = next(base.model.parameters()).device
    order = TrainOrder(Dataset.open("embedded:arabic"), TaskMix(), clips, seed=0)
    batches = [
        [encode_conversation(c, base.vocabulary) for c in order.batch(step)]
        for step in range(repeats + 1)
    ]
    sides = {"eager": side(replace(base, compile=False), rank), "compiled": side(base, rank)}
    sides["eager"](batches[0])
    started = time.perf_counter()
    sides["compiled"](batches[0])
    synchronise(device)
    first_s = time.perf_counter() - started
    for ours, theirs in zip(*(step(batches[1]) for step in sides.values()), strict=True):
        if not (ours - theirs).norm() <= 1e-4 * theirs.norm():
            raise SystemExit(f"losses or gradients differ: {(ours - theirs).norm()}")
    times = alternate(sides, batches[1:], device)
    counters = torch._dynamo.utils.counters
    return {
        "first_s": round(first_s, 1),
        "graphs": counters["stats"]["unique_graphs"],
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
        "rows": [sum(e.num_rows for e in examples) for examples in batches[1:]],
        "every_s": {name: [round(t, 4) for t in taken] for name, taken in times.items()},
    }


def main() -> None:
    """Measure in two processes and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=at_least(1), default=3)
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--repeats", type=at_least(1), default=30)
    parser.add_argument("--out", type=json_file)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.clips, args.rank, args.repeats)))
        return
    facts = machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one"],
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
            )
            if done.returncode:
                raise SystemExit(
                    f"the {name} process ended with exit code {done.returncode}, see above"
                )
            found[name] = json.loads(done.stdout.splitlines()[-1])
    times = found["warm"]["every_s"]
    eager, compiled = (statistics.median(times[name]) for name in ("eager", "compiled"))
    warm_s = found["warm"]["first_s"]
    result = {
        "eager_s": round(eager, 4),
        "compiled_s": round(compiled, 4),
        "ratio": round(eager / compiled, 2),
        "cold_compile_s": found["cold"]["first_s"],
        "warm_compile_s": warm_s,
        "steps_to_pay_warm": round(warm_s / (eager - compiled)) if compiled < eager else None,
        "runs": found,
        "threads": torch.get_num_threads(),
        "machine": facts,
        "settings": settings_of(args),
    }
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    save(args.out, result, picture(times))


if __name__ == "__main__":
    run(main)
