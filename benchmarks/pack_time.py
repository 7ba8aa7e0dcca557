"""Time of an adapter's step in our packs against stock transformers + PEFT with one adapter.

    python benchmarks/pack_time.py --out results/pack_time.json    # and results/pack_time.png
    python benchmarks/pack_time.py --adapters 1,8 --tokens 100 --repeats 3

On the embedded base, each adapter trains on one random clip of --tokens rows per step, with text and audio
targets. For each length, steps of our pack of K adapters and of stock (always one adapter) alternate in one
process, after the losses of the first steps were compared. On a CPU our pack of several is spread over the
cores, whole adapters to each (train/lanes.py); the stock step and our pack of one use all threads in each
operation.
"""

import argparse
import os
from dataclasses import replace
from typing import Any, Literal

import torch
from gpu_step import compare
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from options import ascending, at_least, json_file, new_parser, run
from output import COLORS, machine, new_figure, num_cpus, ratio, save, settings_of

from higgs_tune.config import BaseSettings
from higgs_tune.model.load import Base, load_base


def embedded_base(
    device: str, dtype: Literal["float32", "bfloat16"] = "float32", *, compile: bool = False
) -> Base:
    """The embedded base, which encodes a text of random numbers (random_base.py) as one id per number."""
    base = load_base(BaseSettings(device=device, dtype=dtype, compile=compile))
    vocabulary = base.vocabulary
    first = max(vocabulary.control_ids) + 1

    def encode_text(text: str) -> list[int]:
        words = text.split()
        if words and all(word.isdecimal() for word in words):
            return [first + int(word) for word in words]
        return list(vocabulary.encode_text(text))

    return replace(base, vocabulary=replace(vocabulary, encode_text=encode_text))


def figures(record: dict[str, Any], tokens: int, threads: int) -> dict[str, Any]:
    """A record of `gpu_step.compare` as saved: times per adapter-step and their ratios."""
    adapters, ours, stock = record["adapters"], record["ours"], record["stock"]
    ms = ours.get("ms")
    return {
        "tokens": tokens,
        "adapters": adapters,
        "losses_compared": record["losses_compared"],
        "ours": {name: value for name, value in ours.items() if name != "host_syncs"},
        "stock": stock,
        "ours_ms_per_adapter": None if ms is None else round(ms / adapters, 3),
        "ratio_to_stock": ratio(stock.get("ms"), ms and ms / adapters),
        "ratio_to_alone": record["ratio_to_alone"],
        "threads_ours": f"{min(adapters, threads)} × 1" if adapters > 1 else f"1 × {threads}",
        "threads_stock": f"1 × {threads}",
    }


def picture(packs: list[dict[str, Any]]) -> Figure:
    """Both ratios over the number of adapters, a line for each length."""
    figure, panels = new_figure(2)
    titles = ("Against stock transformers + PEFT", "Against our own pack of one")
    counts = sorted({pack["adapters"] for pack in packs})
    for axes, name, title in zip(panels, ("ratio_to_stock", "ratio_to_alone"), titles, strict=True):
        for color, tokens in zip(COLORS, sorted({p["tokens"] for p in packs}), strict=False):
            own = [p for p in packs if p["tokens"] == tokens and p[name] is not None]
            points = [p["adapters"] for p in own], [p[name] for p in own]
            axes.plot(*points, marker="o", color=color, label=f"{tokens} tokens")
        axes.axhline(1, lw=1, color="#9aa5b1")
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_locator=FixedLocator(counts), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(title=title, xlabel="adapters in the pack", ylim=(0, None))
        axes.legend()
    panels[0].set_ylabel("times faster per adapter-step")
    return figure


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--threads", type=at_least(1), default=num_cpus(), help="torch's threads, on both sides"
    )
    parser.add_argument("--adapters", type=ascending, default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=ascending, default=[100, 400, 1200])
    parser.add_argument(
        "--text-share",
        type=at_least(0, float),
        default=0.15,
        help="share of a clip's rows that are text",
    )
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--repeats", type=at_least(1), default=9)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of both sides"
    )
    parser.add_argument("--compile", action="store_true", help="run ours with base.compile")
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    args = parser.parse_args()
    args.clips = 1
    return args


def main() -> None:
    """Measure, print a line for each pack, write JSON and a picture."""
    args = arguments()
    torch.set_num_threads(args.threads)
    base = embedded_base(args.device, args.dtype, compile=args.compile)
    device = next(base.model.parameters()).device
    packs: list[dict[str, Any]] = []
    result = {"machine": machine(device), "settings": settings_of(args), "packs": packs}
    print("tokens | adapters | ours ms/adapter | stock ms | stock/ours | alone/ours | load")
    for tokens in args.tokens:
        each = argparse.Namespace(**{**vars(args), "tokens": tokens})
        for record in compare(base, each, split=True):
            pack = figures(record, tokens, args.threads)
            packs.append(pack)
            cells = [tokens, pack["adapters"], pack["ours_ms_per_adapter"], pack["stock"].get("ms")]
            cells += [pack["ratio_to_stock"], pack["ratio_to_alone"], round(os.getloadavg()[0], 1)]
            print(" | ".join("–" if cell is None else str(cell) for cell in cells), flush=True)
    save(args.out, result, picture(packs))


if __name__ == "__main__":
    run(main)
