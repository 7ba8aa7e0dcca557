"""Time of one optimizer step: ours (a pack of one) against stock transformers + PEFT.

    python benchmarks/step_time.py [--clips 8] [--repeats 15] [--dtype bfloat16] [--compile]
                                   [--out results/step_time.json]

All sides train on the embedded base and clips, with the same labels and initial weights, and AdamW. They
alternate in one process; the result is the ratio of medians. Losses are compared first, because a faster step
that computes something else would mean nothing. With --compile ours also runs with `base.compile`; its first
step, which compiles, is reported separately.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from matplotlib.figure import Figure
from measured import TOLERANCE
from options import at_least, json_file, run
from output import COLORS, machine, new_figure, save, settings_of
from sides import our_step, stock_step, synchronise

from higgs_tune.config import BaseSettings
from higgs_tune.config_data import TaskMix
from higgs_tune.data.collate import count_targets
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded, encode_conversation
from higgs_tune.model.load import Base, load_base


def batches_of(base: Base, clips: int) -> Iterator[list[Encoded]]:
    """Endless batches of the embedded clips, only those in which both losses have targets."""
    order = TrainOrder(Dataset.open("embedded:arabic"), TaskMix(), clips, seed=0)
    for step in count():
        batch = [encode_conversation(c, base.vocabulary) for c in order.batch(step)]
        targets = count_targets(batch, base.model.config.num_codebooks)
        if targets.text and targets.audio_C.all():
            yield batch


def alternate(
    steps: Mapping[str, Callable[[Any], object]], batches: Iterable[Any], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each side's steps, which alternate on equal batches."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for batch in batches:
        for name, step in steps.items():
            synchronise(device)
            started = time.perf_counter()
            step(batch)
            synchronise(device)
            times[name].append(time.perf_counter() - started)
    return times


def picture(times: dict[str, list[float]]) -> Figure:
    """Times of all steps of each side, in order."""
    figure, (axes,) = new_figure()
    for color, (name, taken) in zip(COLORS, times.items(), strict=False):
        axes.plot([1000 * t for t in taken], marker="o", color=color, label=name)
    axes.set(title="One optimizer step", xlabel="repeat", ylabel="ms", ylim=(0, None))
    axes.legend()
    return figure


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--clips",
        type=at_least(2),
        default=8,
        help="clips per step; at least 2, so that both losses have targets",
    )
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--repeats", type=at_least(1), default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=json_file)
    args = parser.parse_args()
    base = load_base(BaseSettings(dtype=args.dtype, compile=args.compile))
    eager = replace(base, compile=False)
    device = next(base.model.parameters()).device
    facts = machine(device)
    batches = list(islice(batches_of(base, args.clips), 1 + args.repeats))
    steps = {"ours": our_step(eager, [args.rank]), "stock": stock_step(base, args.rank)}
    if args.compile:
        steps["ours compiled"] = our_step(base, [args.rank])
    first, first_s = {}, {}
    for name, step in steps.items():
        started = time.perf_counter()
        first[name] = float(step([batches[0]])[0])
        first_s[name] = round(time.perf_counter() - started, 1)
    tolerance = TOLERANCE[getattr(torch, args.dtype)] * abs(first["stock"])
    if not all(abs(loss - first["stock"]) <= tolerance for loss in first.values()):
        raise SystemExit(f"the first losses differ: {first}")
    times = alternate(steps, [[examples] for examples in batches[1:]], device)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    result = {
        "step_s": {name: round(seconds, 4) for name, seconds in medians.items()},
        "stock_to_ours": {
            name: round(medians["stock"] / seconds, 2)
            for name, seconds in medians.items()
            if name != "stock"
        },
        "first_step_s": first_s,
        "clips": args.clips,
        "rows_per_step": round(statistics.mean(sum(e.num_rows for e in b) for b in batches)),
        "repeats": len(times["ours"]),
        "threads": torch.get_num_threads(),
        "every_s": {name: [round(t, 4) for t in taken] for name, taken in times.items()},
        "machine": facts,
        "settings": settings_of(args),
    }
    print(json.dumps(result, indent=1))
    save(args.out, result, picture(times))


if __name__ == "__main__":
    run(main)
