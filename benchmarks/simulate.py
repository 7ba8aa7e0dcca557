"""Simulate how long sweeps of 100 and 1000 trials take on 1 to 64 GPUs, with and without packing.

    python benchmarks/simulate.py --out results/simulate.json      # and results/simulate.png
    python benchmarks/simulate.py --steps results/gpu_pack.json --fixed results/fixed_costs.json

A simulation (sweep_model.py), not a measurement. It takes step times from the JSON of pack_time.py,
gpu_step.py or gpu_pack.py, and the fixed costs from that of fixed_costs.py. Without these files it assumes
figures of an H100 and clips of 600 tokens, and says so in its output. It compares our packs of --slots
adapters, our packs of one, and stock transformers + PEFT, one trial per GPU with its process reused. If
--steps has stock processes that shared a GPU, they are a fourth way, and "times faster" is against the faster
stock way.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from options import ascending, at_least, json_file, new_parser, run
from output import COLORS, machine, new_figure, ratio, save, settings_of
from sweep_model import Costs, Failures, Search, simulate

from higgs_tune.config import SchedulerSettings
from higgs_tune.config_file import validate
from higgs_tune.errors import DataError

# Assumed until measured: at 600 tokens, a step of up to about 8 adapters takes as long as launching its
# kernels, however many adapters there are; beyond that the time grows with the tokens.
ASSUMED_STEPS = {1: 0.100, 2: 0.100, 4: 0.100, 8: 0.100, 16: 0.170}
ASSUMED_STOCK_S = 0.100
ASSUMED_FIXED = {
    "ours": {"start_s": 60.0, "between_s": 0.5},
    "stock": {"start_s": 60.0, "between_s": 0.8},
}
ASK_TELL_S = 0.043  # Optuna's journal, measured once on a 2-core machine
NAMES = {
    "packed": "packs",
    "alone": "packs of one",
    "stock": "stock, process reused",
    "shared": "stock, several a GPU",
}


def step_times(
    packs: Sequence[Mapping[str, Any]], tokens: int | None
) -> tuple[dict[int, float], float]:
    """Seconds of our step by the number of adapters, and of the stock step, from measured packs.

    Args:
        packs: the records in a benchmark's JSON.
        tokens: which of several lengths to use; None if there is only one.
    """
    lengths = sorted({pack["tokens"] for pack in packs if "tokens" in pack})
    if tokens is None and len(lengths) > 1:
        raise SystemExit(f"--steps has several lengths, {lengths}: choose one with --tokens")
    chosen = [p for p in packs if tokens is None or p.get("tokens", tokens) == tokens]
    ours = {p["adapters"]: p["ours"]["ms"] / 1000 for p in chosen if "ms" in p["ours"]}
    stock = [p["stock"]["ms"] / 1000 for p in chosen if "ms" in p["stock"]]
    if 1 not in ours or not stock:
        raise SystemExit("--steps has no time for a pack of one, or none for the stock step")
    return ours, float(np.median(stock))


def shared_steps(measured: Mapping[str, Any], stock_s: float) -> dict[int, float]:
    """Number of stock processes on a GPU, 1 or all → seconds of a step of each; empty if not measured.

    Args:
        measured: the JSON of gpu_pack.py or of another benchmark.
        stock_s: a step of a process that has the GPU to itself.
    """
    shared = measured.get("shared", {})
    if shared.get("status") != "ok":
        return {}
    processes = shared["processes"]
    return {1: stock_s, processes: processes * shared["ms_per_adapter"] / 1000}


def table_of(steps: Mapping[int, float], num_slots: int) -> tuple[float, ...]:
    """Seconds of a step of 1, 2, … `num_slots` adapters, interpolated between those measured."""
    known = sorted(steps)
    if num_slots > known[-1]:
        raise SystemExit(
            f"--slots {num_slots}: packs were measured only up to {known[-1]} adapters"
        )
    counts = range(1, num_slots + 1)
    return tuple(float(s) for s in np.interp(counts, known, [steps[k] for k in known]))


def ways(args: argparse.Namespace) -> tuple[dict[str, Costs], list[str]]:
    """The costs of each way, and the names of those that are assumed."""
    assumed = ["ask_tell_s", "validation_steps"]
    together: dict[int, float] = {}
    if args.steps:
        measured = read(args.steps, "packs")
        ours, stock_s = step_times(measured["packs"], args.tokens)
        together = shared_steps(measured, stock_s)
    else:
        ours, stock_s = ASSUMED_STEPS, ASSUMED_STOCK_S
        assumed.append("step_s")
    fixed = ASSUMED_FIXED
    if args.fixed:
        found = read(args.fixed, "ours", "strong")
        fixed = {
            whose: {
                "start_s": found[way]["command_to_first_step_s"],
                "between_s": found[way]["between_s"],
            }
            for whose, way in (("ours", "ours"), ("stock", "strong"))
        }
    else:
        assumed += ["start_s", "between_s"]

    def costs(step_s: tuple[float, ...], whose: str) -> Costs:
        return Costs(
            step_s, **fixed[whose], ask_tell_s=args.ask_tell, validation_steps=args.validation_steps
        )

    found = {
        "packed": costs(table_of(ours, args.slots), "ours"),
        "alone": costs((ours[1],), "ours"),
        "stock": costs((stock_s,), "stock"),
    }
    if together:
        found["shared"] = costs(table_of(together, max(together)), "stock")
    return found, sorted(assumed)


def read(path: Path, *needed: str) -> dict[str, Any]:
    """A benchmark's JSON, which must have the needed entries."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    missing = [name for name in needed if not isinstance(found, dict) or name not in found]
    if missing:
        raise DataError(
            f"{path}: has no {' and no '.join(missing)}; is it from the right benchmark?"
        )
    return found


def picture(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Makespan over GPUs, a panel for each number of trials."""
    counts = sorted({run["trials"] for run in runs})
    gpus = sorted({run["gpus"] for run in runs})
    figure, panels = new_figure(len(counts))
    for axes, trials in zip(panels, counts, strict=True):
        for color, style, way in zip(COLORS, ("-", "--", "-", "--"), NAMES, strict=False):
            own = [run for run in runs if run["trials"] == trials and run["way"] == way]
            if not own:
                continue
            hours = [run["makespan_h"] for run in own]
            points, look = ([r["gpus"] for r in own], hours), {"color": color, "ls": style}
            # dashes above the solid line where both coincide
            axes.plot(
                *points, marker="o", label=NAMES[way], **look, zorder=3 if style == "--" else 2
            )
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{trials} trials (simulated)")
        axes.xaxis.set(major_locator=FixedLocator(gpus), minor_locator=NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
        axes.legend()
    panels[0].set_ylabel("hours from the command to the last trial's end")
    return figure


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=Path, help="JSON of pack_time, gpu_step or gpu_pack")
    parser.add_argument("--tokens", type=at_least(1), help="which length of --steps to use")
    parser.add_argument("--fixed", type=Path, help="JSON of fixed_costs")
    parser.add_argument("--trials", type=ascending, default=[100, 1000])
    parser.add_argument("--gpus", type=ascending, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--slots", type=at_least(1), default=8, help="slots of a pack")
    parser.add_argument(
        "--num-steps", type=at_least(1), default=900, help="steps of a trial's full budget"
    )
    parser.add_argument("--report-every", type=at_least(1), default=100)
    parser.add_argument("--scheduler", choices=("asha", "none"), default="asha")
    parser.add_argument("--grace-fraction", type=float, default=0.334)
    parser.add_argument("--validation-steps", type=at_least(0, float), default=10)
    parser.add_argument(
        "--ask-tell", type=at_least(0, float), default=ASK_TELL_S, help="seconds per trial"
    )
    parser.add_argument(
        "--failures",
        type=at_least(0, float),
        default=0.01,
        help="failures of a GPU's node per hour",
    )
    parser.add_argument(
        "--repair", type=at_least(0, float), default=300.0, help="seconds until a lost node is back"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    args = parser.parse_args()
    if args.num_steps % args.report_every:
        parser.error("--num-steps must be a multiple of --report-every")
    return args


def main() -> None:
    """Simulate, print a table, write JSON and a picture."""
    args = arguments()
    costs, assumed = ways(args)
    settings = {"name": args.scheduler, "grace_fraction": args.grace_fraction}
    scheduler = validate(SchedulerSettings, settings, "simulate.py")
    failures = Failures(args.failures, args.repair)
    runs: list[dict[str, Any]] = []
    print(f"simulated; assumed, not measured: {', '.join(assumed)}")
    print("trials | GPUs | " + " | ".join(f"{NAMES[way]}: h" for way in costs) + " | times faster")
    for trials in args.trials:
        search = Search(trials, args.num_steps, args.report_every, scheduler)
        for gpus in args.gpus:
            hours = {}
            for way, cost in costs.items():
                outcome = simulate(cost, search, gpus, failures=failures, seed=args.seed)
                hours[way] = outcome.makespan_s / 3600
                run = {"way": way, "trials": trials, "gpus": gpus, "makespan_h": hours[way]}
                runs.append(run | asdict(outcome))
            faster = ratio(min(hours["stock"], hours.get("shared", math.inf)), hours["packed"])
            cells = [trials, gpus, *(round(h, 2) for h in hours.values()), faster]
            print(" | ".join(map(str, cells)))
    result = {
        "simulated": True,
        "assumed": assumed,
        "costs": {way: asdict(cost) for way, cost in costs.items()},
        "machine": machine(),
        "settings": settings_of(args),
        "runs": runs,
    }
    save(args.out, result, picture(runs))


if __name__ == "__main__":
    run(main)
