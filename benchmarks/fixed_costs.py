"""Time that a sweep spends besides training: up to its first step, and between two trials of a slot.

    python benchmarks/fixed_costs.py --out results/fixed_costs.json    # and results/fixed_costs.png

Ours is the user's command, `python sweeps/run.py`, on a tiny sweep, timed by the JSON lines that it prints
and by workers.json. The same trials then run with stock transformers + PEFT under Ray Tune: with one process
per trial (plain) and with processes reused (strong), see stock_tune.py. The first run of each is not counted:
it warms the disk's caches. "Between" is from the last validated result of a trial to the first step of the
trial that takes its slot; for ours it is a sweep's median, counting only time in which the pack did not
train.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from options import at_least, json_file, new_parser, run
from output import COLORS, machine, new_figure, num_cpus, save, settings_of
from stock_base import REPORTED, STARTED
from sweep_time import HERE, WAYS, Results, environment, our_trials, settings_file, timed

from higgs_tune.files import write_json

COSTS = {"command_to_first_step_s": "command to first step", "between_s": "between two trials"}


def our_costs(
    started: float, events: Sequence[Mapping[str, Any]], workers: Mapping[str, Any]
) -> dict[str, Any]:
    """Fixed costs of our sweep.

    Args:
        started: `time.time()` at the command.
        events: the events that the sweep printed, each with its time.
        workers: contents of `workers.json`.

    Returns:
        Seconds. The start of the first step is noticed up to 0.1 s late.
    """
    begun = min(event["time"] for event in events if event["event"] == "training")
    refills = [figures["refill_median_s"] for figures in workers.values()]
    return {
        "command_to_first_step_s": begun - started,
        "between_s": [seconds for seconds in refills if seconds is not None],
    }


def their_costs(started: float, results: Results, processes: int) -> dict[str, Any]:
    """Fixed costs of stock trials: the n-th trial that ends makes room for the next that starts."""
    starts = sorted(lines[0][STARTED] for lines in results.values())
    ends = sorted(lines[-1][REPORTED] for lines in results.values())
    gaps = [begun - ended for begun, ended in zip(starts[processes:], ends, strict=False)]
    return {"command_to_first_step_s": starts[0] - started, "between_s": gaps}


def run_command(settings: Path) -> tuple[float, list[dict[str, Any]]]:
    """Run the sweep as a user does; returns `time.time()` at the command and the printed events."""
    command = [sys.executable, str(HERE.parent / "sweeps" / "run.py"), "--config", str(settings)]
    started = time.time()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode not in (0, 3):  # 3: nothing was feasible, usual for a short sweep
        raise SystemExit(
            f"our sweep ended with exit code {done.returncode}:\n{done.stderr[-4000:]}"
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"event"')]
    return started, [json.loads(line) for line in lines]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Run every way once; returns the costs of each."""
    settings = settings_file(folder, args)
    started, events = run_command(settings)
    trials, _ = our_trials(folder / "ours")
    workers = json.loads((folder / "ours" / "workers.json").read_text())
    ways = {"ours": our_costs(started, events, workers)}
    given = folder / "trials.json"
    write_json(given, {"trials": [t for t in trials if t["trial"]["cross_attention"] == "off"]})
    for way in args.ways:
        out = folder / f"{way}.json"
        started = time.time()
        options = ["--given", given, "--processes", args.processes, "--out", out]
        timed(way, "--sweep", settings, *options)
        ways[way] = their_costs(started, json.loads(out.read_text())["results"], args.processes)
    return ways


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one way, and the single figures."""
    firsts = [run["command_to_first_step_s"] for run in runs]
    gaps = [gap for run in runs for gap in run["between_s"]]
    if not gaps:
        raise SystemExit("no trial followed another: raise --trials or lower --slots, --processes")
    return {
        "command_to_first_step_s": round(median(firsts), 3),
        "between_s": round(median(gaps), 3),
        "every_command_to_first_step_s": [round(s, 3) for s in firsts],
        "every_between_s": [round(s, 3) for s in gaps],
    }


def picture(ways: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Both costs of each way."""
    figure, panels = new_figure(2)
    for axes, (cost, title) in zip(panels, COSTS.items(), strict=True):
        values = [figures[cost] for figures in ways.values()]
        bars = axes.barh([WAYS[way] for way in ways], values, color=COLORS[: len(values)])
        axes.bar_label(bars, [f"{value:.2f} s" for value in values], padding=4)
        axes.set(title=title[0].upper() + title[1:], xlabel="seconds")
        axes.set_xlim(0, 1.25 * max(values))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    panels[1].set_yticklabels([])
    return figure


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--trials", type=at_least(1), default=9)
    parser.add_argument("--slots", type=at_least(1), default=4, help="slots of our worker")
    parser.add_argument(
        "--processes", type=at_least(1), default=num_cpus(), help="processes of the other ways"
    )
    parser.add_argument(
        "--repeats",
        type=at_least(0),
        default=3,
        help="runs after one that is not counted; 0: count that one",
    )
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="1: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ways", nargs="*", choices=("plain", "strong"), default=["plain", "strong"]
    )
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    args = parser.parse_args()
    # trial 1 has audio_self, which the stock model lacks
    most = max(args.slots, args.processes + 1 if args.ways else 0)
    if args.trials <= most:
        parser.error(
            f"--trials {args.trials}: no trial would follow another; these --slots and "
            f"--processes need {most + 1}"
        )
    small = {"num_steps": 8, "report_every": 4, "clips": 3, "val_clips": 4, "scheduler": "none"}
    return argparse.Namespace(**vars(args), **small, workers=1)


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    args = arguments()
    facts = machine("cuda" if args.gpus else "cpu")
    runs = []
    for _ in range(args.repeats + 1):
        with tempfile.TemporaryDirectory(prefix="ht") as folder:
            runs.append(measure(args, Path(folder)))
    counted = runs[1:] or runs
    ways = {way: summary([run[way] for run in counted]) for way in runs[0]}
    print("way | " + " | ".join(f"{title}: s" for title in COSTS.values()))
    for way, found in ways.items():
        print(" | ".join([WAYS[way], *(str(found[cost]) for cost in COSTS)]))
    result = {"machine": facts, "settings": settings_of(args), **ways}
    save(args.out, result, picture(ways))


if __name__ == "__main__":
    run(main)
