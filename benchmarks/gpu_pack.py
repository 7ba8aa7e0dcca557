"""Packing at full size on one GPU, in one call: against one stock process, against several, and how many fit.

    python benchmarks/gpu_pack.py --out results/gpu_pack.json      # and results/gpu_pack.png
    python benchmarks/gpu_pack.py --fill --out results/gpu_pack.json
    python benchmarks/gpu_pack.py --preset small --device cpu      # a minute, to see that it works

Each adapter trains rank 16 on all linears of a random base of the real configuration (random_base.py), with
one clip of --tokens rows per step. First, for each number of --adapters, steps of the pack and of stock
alternate in one process (gpu_step.py), after their losses were compared. Then the largest pack that fitted
runs with the ranks of --unlike in turn, because a search mixes ranks. Then --processes stock processes, each
with its own base, start together and train on the GPU for --seconds: the driver gives them the GPU in turn,
or at once if an MPS daemon runs, which the figures say. --fill searches for the largest pack of which two
steps fit, starting at the memory model's prediction. Each figure is printed and saved as soon as it is there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_step import compare
from matplotlib.figure import Figure
from measured import free_memory
from options import ascending, at_least, json_file, new_parser, run
from output import COLORS, machine, new_figure, ratio, save, settings_of
from random_base import PRESETS
from sides import our_step, prediction, synchronise
from stock_processes import base_of, clips_of, measure_shared, run_stock_process

from higgs_tune.device import resolve_device
from higgs_tune.errors import is_out_of_memory


def measure_packs(args: argparse.Namespace, ranks: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Measure packs against the stock step in this process, then free their memory."""
    for record in compare(base_of(args), args, ranks=ranks):
        ours, stock = (record[side].get("ms") for side in ("ours", "stock"))
        share, faster = record["share_of_floor_h100"], record["ratio_to_stock"]
        named = f"{record['adapters']} adapters of rank {', '.join(map(str, ranks))}"
        print(f"{named}: ours {ours} ms, stock {stock} ms for one;", end=" ")
        print(f"{faster} × faster per adapter, {share} of an H100's rate", flush=True)
        yield record
    free_memory()


def largest(fits: Callable[[int], bool], limit: int, guess: int = 1) -> int:
    """The largest number up to `limit` that fits, 0 if none; every number below one that fits must fit.

    Searches from `guess` in steps that double, until one number fits and one does not, then bisects.
    """
    good, bad, tried, stride = 0, limit + 1, min(max(guess, 1), limit), 1
    while bad - good > 1:
        if fits(tried):
            good = tried
        else:
            bad = tried
        if good and bad <= limit:
            tried = (good + bad) // 2
        else:
            tried = min(good + stride, limit) if good else max(bad - stride, 1)
        stride *= 2
    return good


def measure_fill(args: argparse.Namespace, gib: float) -> dict[str, Any]:
    """How many adapters fit: into `gib` by the memory model, and with --fill by trying."""
    base = base_of(args)
    device = next(base.model.parameters()).device
    examples = clips_of(base, args, 0, 0)

    by_model = prediction(base, args.rank, examples)
    predicted = largest(lambda adapters: by_model(adapters) <= gib * 2**30, args.limit)
    print(f"{predicted} adapters are predicted to fit", flush=True)

    def runs(adapters: int) -> bool:
        fits = True
        try:
            step = our_step(base, [args.rank] * adapters)
            for _ in range(2):  # the second also holds the optimizer's state
                step([clips_of(base, args, adapter, 0) for adapter in range(adapters)])
            synchronise(device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False  # free later: the traceback holds tensors until this block ends
        step = None
        free_memory()
        print(f"{adapters} adapters {'fit' if fits else 'do not fit'}", flush=True)
        return fits

    return {
        "gib": round(gib, 2),
        "predicted": predicted,
        "measured": largest(runs, args.limit, predicted) if args.fill else None,
        "limit": args.limit,
    }


def ratios(packs: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per-adapter speed-up of each pack against one stock process and against several."""
    found = []
    for pack in packs:
        ms = pack["ours"].get("ms")
        each = ms and ms / pack["adapters"]
        found.append(
            {
                "adapters": pack["adapters"],
                "ms_per_adapter": each and round(each, 3),
                "to_one_process": ratio(pack["stock"].get("ms"), each),
                "to_shared": ratio(shared.get("ms_per_adapter"), each),
                "share_of_h100": pack["share_of_floor_h100"],
                "share_here": pack["share_of_floor_here"],
            }
        )
    return found


def picture(found: Sequence[Mapping[str, Any]], processes: int) -> Figure:
    """Speed-ups, and the share of the device's matmul rate, over the number of adapters."""
    figure, (times, shares) = new_figure(2)
    counts = [str(one["adapters"]) for one in found]
    names = {"to_one_process": "one stock process", "to_shared": f"{processes} at once"}
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        own = [(n, one[name]) for n, one in zip(counts, found, strict=True) if one[name]]
        points = [n for n, _ in own], [value for _, value in own]
        times.plot(*points, marker="o", color=color, label=label)
    times.axhline(1, lw=1, color="#9aa5b1")
    times.set(title="Times faster per adapter-step than", ylim=(0, None), xlabel="adapters")
    times.legend()
    share = [one["share_here"] or 0 for one in found]
    shares.bar(counts, share, color=COLORS[2])
    shares.set(title="Share of a large matmul's rate here", ylim=(0, 1), xlabel="adapters")
    return figure


def rank_list(text: str) -> list[int]:
    """Numbers in the given order, from text such as "16,8"."""
    return [at_least(1)(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--adapters", type=ascending, default=[1, 8])
    parser.add_argument("--tokens", type=at_least(1), default=600, help="rows of an adapter's step")
    parser.add_argument(
        "--text-share",
        type=at_least(0, float),
        default=0.15,
        help="share of a clip's rows that are text",
    )
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument(
        "--unlike", type=rank_list, default=[16, 8, 32, 64], help="ranks of the mixed pack, in turn"
    )
    parser.add_argument("--repeats", type=at_least(1), default=15)
    parser.add_argument(
        "--processes", type=at_least(0), default=4, help="stock processes at once; 0: none"
    )
    parser.add_argument(
        "--seconds", type=at_least(0.1, float), default=20.0, help="seconds that they train"
    )
    parser.add_argument("--fill", action="store_true", help="add adapters until none fits")
    parser.add_argument("--limit", type=at_least(1), default=512, help="the most adapters to try")
    parser.add_argument(
        "--gib",
        type=at_least(0, float),
        help="GiB for the prediction; default: free memory of the device, or 80 on a CPU",
    )
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    parser.add_argument("--as-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.clips = 1
    return args


def main() -> None:
    """Measure everything, print, write JSON and a picture; or be one of the stock processes."""
    args = arguments()
    if args.as_process:
        run_stock_process(args)
        return
    device = resolve_device(args.device, "--device")
    gib = args.gib or (torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 80)
    packs: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "machine": machine(device),
        "settings": settings_of(args),
        "packs": packs,
        "shared": {"status": "left_out"},
    }
    command = [sys.executable, str(Path(__file__).resolve())]
    command += [
        f"--{n}={getattr(args, n)}" for n in ("preset", "device", "dtype", "tokens", "rank")
    ]
    command += [f"--text-share={args.text_share}", f"--seconds={args.seconds}"]

    def keep(**parts: Any) -> None:
        for name, part in parts.items():
            result[name] = part
            print(f"{name}: {json.dumps(part)}", flush=True)
        result["ratios"] = ratios(packs, result["shared"])
        if "unlike" in result:
            result["unlike_ratios"] = ratios(result["unlike"], result["shared"])
        save(args.out, result, picture(result["ratios"], args.processes))

    for pack in measure_packs(args, [args.rank]):
        packs.append(pack)
        keep()  # save now: the next pack may kill the process
    if fitted := [pack["adapters"] for pack in packs if "ms" in pack["ours"]]:
        largest_pack = argparse.Namespace(**{**vars(args), "adapters": [max(fitted)]})
        result["unlike"] = list(measure_packs(largest_pack, args.unlike))
        keep()
    if args.processes:
        keep(shared=measure_shared(args, command))
    keep(fits=measure_fill(args, gib))
    for name in ("ratios", "unlike_ratios"):
        print(f"{name}: {json.dumps(result.get(name))}")


if __name__ == "__main__":
    run(main)
