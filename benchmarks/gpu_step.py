"""Time and memory of a full-size optimizer step: ours against stock transformers + PEFT.

    python benchmarks/gpu_step.py                                              # 8 clips of 400 tokens
    python benchmarks/gpu_step.py --adapters 1,2,4,8,16 --clips 1 --tokens 600 # packing
    python benchmarks/gpu_step.py --preset small                               # seconds on a CPU
    python benchmarks/gpu_step.py --layers 8 --dtype float32 --split --adapters 1,2,4 --clips 1 --tokens 100
                                   # a fifth of the model at its real width, on a CPU with 16 GiB

The base has the real configuration and random weights, made on the device; nothing is downloaded. Both sides
train all-linear LoRA with AdamW on the same frozen tensors, examples and labels, from the same initial
weights. Their losses are compared first. Then, for each number of adapters, our step and a stock step (one
adapter) alternate. A side that runs out of memory is noted as out_of_memory; the other's figures stay.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from measured import Side, check_losses, free_memory
from options import ascending, at_least, json_file, new_parser, run
from output import machine, ratio, settings_of
from random_base import PRESETS, random_base, random_clips, step_flops
from sides import our_step, prediction, stock_step, synchronise

from higgs_tune.device import resolve_device
from higgs_tune.files import write_json
from higgs_tune.model.load import Base

# An H100 SXM does 989 TFLOP/s in dense bf16 on paper; large matmuls reach about 79 % of that.
H100_FLOPS = 783e12
NUM_BATCHES = 4


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul on this device: the median of ten runs."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(13):
        synchronise(device)
        started = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[3:])


def compare(
    base: Base, args: argparse.Namespace, *, ranks: Sequence[int] = (), split: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure and yield a record for each number of adapters, up to the first that does not fit.

    The pack's adapters have `ranks` in turn (by default all `args.rank`), the stock one has the first. With
    `split` our pack is spread over the cores of a CPU; then its host syncs are not seen and its memory is
    not predicted. Host syncs of a compiled step are counted on a GPU only.
    """
    parameter = next(base.model.parameters())
    device, dtype = parameter.device, parameter.dtype
    tensors = [*base.model.parameters(), *base.model.buffers()]
    base_bytes = sum(t.numel() * t.element_size() for t in tensors)
    batches = [
        [
            random_clips(base, args.clips, args.tokens, args.text_share, (adapter, number))
            for adapter in range(max(args.adapters))
        ]
        for number in range(NUM_BATCHES)
    ]
    ranks = ranks or (args.rank,)
    here = matmul_flops(device, dtype)
    # for a pack with shared matmuls; after this computation autograd prevents forking lanes
    predicted = None if split else prediction(base, max(ranks), batches[0][0])
    stock: Side | None = None
    alone: float | None = None
    for adapters in args.adapters:
        own = [ranks[n % len(ranks)] for n in range(adapters)]
        flops = [step_flops(base.model.config, rank, batches[0][0]) for rank in own]
        make = partial(our_step, base, own, split=split)
        countable = not base.compile or device.type == "cuda"
        ours = Side.made(make, adapters, batches, device, base_bytes, count_syncs=countable)
        if stock is None:
            stock = Side.made(partial(stock_step, base, ranks[0]), 1, batches, device, base_bytes)
        compared = check_losses(ours, stock, dtype)
        ours.times, stock.times = [], []
        for number in range(args.repeats):
            for side in (ours, stock):
                side.attempt(partial(side.timed, batches[number % NUM_BATCHES]))
        tokens = args.clips * args.tokens
        record = {
            "adapters": adapters,
            "ranks": own,
            "losses_compared": compared,
            "tflop": round(sum(flops) / 1e12, 4),
            "floor_h100_ms": round(1000 * sum(flops) / H100_FLOPS, 4),
            "floor_here_ms": round(1000 * sum(flops) / here, 4),
            "stock_floor_here_ms": round(1000 * flops[0] / here, 4),
            "matmul_here_tflops": round(here / 1e12, 3),
            "predicted_gib": predicted and round(predicted(adapters) / 2**30, 4),
            "ours": ours.figures(tokens),
            "stock": stock.figures(tokens),
        }
        ms = record["ours"].get("ms")
        alone = ms if adapters == 1 else alone
        yield record | shares(record, alone)
        if ours.step is None:
            return
        ours.step = None  # frees its memory for the next pack
        free_memory()


def shares(record: dict[str, Any], alone_ms: float | None) -> dict[str, float | None]:
    """A record's ratios: to both floors, and to stock steps and packs of one for as many adapters."""
    ours, stock, adapters = record["ours"].get("ms"), record["stock"].get("ms"), record["adapters"]
    share = partial(ratio, digits=4)
    return {
        "share_of_floor_h100": share(record["floor_h100_ms"], ours),
        "share_of_floor_here": share(record["floor_here_ms"], ours),
        "stock_share_of_floor_here": share(record["stock_floor_here_ms"], stock),
        "ratio_to_stock": share(stock and adapters * stock, ours),
        "ratio_to_alone": share(alone_ms and adapters * alone_ms, ours),
    }


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    cells: list[Any] = [record["adapters"]]
    for side in (record["ours"], record["stock"]):
        if side["status"] == "ok":
            cells += [side["ms"], side["tokens_per_s"], side["peak_gib"], side["host_syncs"]]
        else:
            cells += ["out of memory", None, None, None]
    cells += [record[name] for name in ("predicted_gib", "tflop", "floor_h100_ms", "floor_here_ms")]
    cells += [record[name] for name in ("share_of_floor_h100", "share_of_floor_here")]
    cells += [record[name] for name in ("ratio_to_stock", "ratio_to_alone")]
    return " | ".join("–" if cell is None else str(cell) for cell in cells)


COLUMNS = (
    "adapters | ours: ms | tokens/s | GiB | syncs | stock, one adapter: ms | tokens/s | GiB | syncs | "
    "predicted GiB | TFLOP | H100 ms | here ms | share H100 | share here | stock/ours | alone/ours"
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument(
        "--layers", type=at_least(1), help="number of layers, instead of the preset's"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--split", action="store_true", help="each adapter on one core, as in a sweep on CPUs"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--adapters", type=ascending, default=[1], help="numbers of adapters, such as 1,2,4,8"
    )
    parser.add_argument("--clips", type=at_least(1), default=8, help="clips of each adapter's step")
    parser.add_argument(
        "--tokens", type=at_least(1), default=400, help="rows of a clip, text and audio"
    )
    parser.add_argument(
        "--text-share",
        type=at_least(0, float),
        default=0.15,
        help="share of a clip's rows that are text",
    )
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--repeats", type=at_least(1), default=15)
    parser.add_argument(
        "--out", type=json_file, help="JSON file, written after each number of adapters"
    )
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write JSON."""
    args = arguments()
    device = resolve_device(args.device, "--device")
    started = time.perf_counter()
    config = copy.deepcopy(PRESETS[args.preset])
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    base = random_base(config, device, getattr(torch, args.dtype))
    synchronise(device)
    result: dict[str, Any] = settings_of(args) | {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "base_s": round(time.perf_counter() - started, 2),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "packs": [],
    }
    print(f"{args.preset} base of {result['parameters'] / 1e9:.3f} B parameters in {args.dtype} on")
    print(
        f"{result['machine']['device']}; {args.clips} × {args.tokens} tokens a step and adapter\n{COLUMNS}"
    )
    for record in compare(base, args, split=args.split):
        result["packs"].append(record)
        print(row(record), flush=True)
        if args.out:
            write_json(args.out, result)


if __name__ == "__main__":
    run(main)
