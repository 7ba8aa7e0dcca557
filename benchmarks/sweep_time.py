"""Time of a whole sweep: ours against stock transformers + PEFT under Ray Tune, run in two ways.

    python benchmarks/sweep_time.py --out results/sweep_time.json    # and results/sweep_time.png
    python benchmarks/sweep_time.py --trials 24 --num-steps 400 --report-every 100

Ours runs first, a search with ASHA on the embedded base. The two others (stock_tune.py) then run the same
trials on the same batches, each for as many steps as in our sweep: equal work, whatever order results come
in. They skip what ours does besides: asking Optuna, checkpoints, validation after other clips' audio. Each
way has its own process and Ray; its time is that of the whole process, including start and end. With
--repeats the order rotates, and times are medians. The script stops if the final losses of the same trials
differ by more than TOLERANCE in the median. Trial 1 of a sweep normally has audio_self, which the stock model
lacks; here it is sampled like the others.
"""

import argparse
import json
import os
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
from output import COLORS, machine, new_figure, num_cpus, ratio, save, settings_of

from higgs_tune.config_file import load_sweep, to_yaml
from higgs_tune.files import read_json_lines, write_json, write_text
from higgs_tune.metrics import STEP, VAL_TEXT_NLL

HERE = Path(__file__).resolve().parent
QUICK = HERE.parent / "sweeps" / "quick.yaml"
WAYS = {"ours": "ours", "plain": "plain: a process a trial", "strong": "strong: processes reused"}
TOLERANCE = 0.03  # relative; float32 sums are split differently in each way
Results = Mapping[str, Sequence[Mapping[str, Any]]]  # trial → its results


def settings_file(folder: Path, args: argparse.Namespace) -> Path:
    """Write our sweep's YAML: a smaller quick.yaml with only what a stock model can train."""
    codebooks = 8  # as the weight of our mean over codebooks, it gives the stock loss's sum
    overrides = {
        "name": "ours",
        "results_dir": str(folder),
        "space.cross_attention": "[off]",
        "space.audio_loss_weight": codebooks,
        "space.batch_clips": f"[{args.clips}]",
        "train.num_steps": args.num_steps,
        "train.report_every_steps": args.report_every,
        "tune.num_trials": args.trials,
        "tune.num_workers": args.workers,
        "tune.slots_per_worker": args.slots,
        "tune.gpus_per_worker": args.gpus,
        "base.device": "cuda" if args.gpus else "cpu",  # for every way
        "tune.seed": args.seed,
        "tune.scheduler.name": args.scheduler,
        "data.num_val_clips": args.val_clips,
        "confirm.num_configs": 0,
    }
    path = folder / "sweep.yaml"
    config = load_sweep(QUICK, [f"{name}={value}" for name, value in overrides.items()])
    write_text(path, to_yaml(config))
    return path


def run_ours(settings: Path) -> None:
    """Run our sweep; called in its own process."""
    from higgs_tune.sweep.driver import run_sweep
    from higgs_tune.sweep.searcher import StudySearcher

    # trial 1 would have audio_self, which the stock model cannot train
    StudySearcher._ask_baseline = StudySearcher._sample
    run_sweep(load_sweep(settings, []), resume=False, command=["benchmarks/sweep_time.py"])


def run_theirs(way: str, settings: Path, trials: Path, processes: int, out: Path) -> None:
    """Run given trials with stock transformers + PEFT; called in its own process."""
    from stock_tune import run_stock

    from higgs_tune.cluster import join_cluster
    from higgs_tune.sweep.runtime import ENVIRONMENT

    config, given = load_sweep(settings, []), json.loads(trials.read_text())
    with join_cluster(ENVIRONMENT):
        results = run_stock(way, config, given["trials"], processes, out.parent / way)
    write_json(out, {"results": results})


def environment() -> dict[str, str]:
    """Environment of a way's process: all cores, and its own Ray whose workers find these modules."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    ours = {"RAY_ADDRESS": "local", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return inherited | ours


def timed(way: str, *options: object) -> float:
    """Run a way in a process; returns the seconds of the whole process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--way", way, *map(str, options)]
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        done = subprocess.run(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        seconds = time.perf_counter() - started
        if done.returncode not in (0, 3):  # 3: nothing was feasible, usual for a short sweep
            log.seek(0)
            tail = log.read().decode(errors="replace")[-4000:]
            raise SystemExit(f"{way} ended with exit code {done.returncode}:\n{tail}")
    return seconds


def our_trials(folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Our sweep's trials with the step at which each ended, and their results."""
    from higgs_tune.sweep.records import TrialFiles

    files = TrialFiles(folder)
    trials, results = [], {}
    for record in files.records("t"):
        lines = read_json_lines(files.folder(record.trial_id) / "metrics.jsonl")
        if not lines:
            raise SystemExit(f"{record.trial_id} of our sweep has no result")
        results[record.trial_id] = lines
        config = record.config.model_dump(mode="json")
        trials.append({"id": record.trial_id, "trial": config, "stop_at": lines[-1][STEP]})
    return trials, results


def losses(results: Results) -> dict[str, float]:
    """Each trial's final validation text loss."""
    return {trial: lines[-1][VAL_TEXT_NLL] for trial, lines in results.items()}


def compare(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Relative differences of the same trials' final losses; exits if they are too large."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"not the same trials as ours: {sorted(ours.keys() ^ theirs.keys())}")
    apart = [abs(theirs[trial] - ours[trial]) / ours[trial] for trial in ours]
    found = {"median": round(median(apart), 4), "largest": round(max(apart), 4)}
    if found["median"] > TOLERANCE:
        raise SystemExit(f"final losses of the same trials differ too much, relative: {found}")
    return found


def summary(times: Sequence[float], results: Results, steps: int) -> dict[str, Any]:
    """The figures of one way."""
    final, seconds = losses(results), median(times)
    return {
        "wall_s": round(seconds, 2),
        "every_wall_s": [round(each, 2) for each in times],
        "trials_per_hour": round(3600 * len(final) / seconds, 1),
        "steps": steps,
        "best_text_nll": round(min(final.values()), 4),
        "best_trial": min(final, key=lambda trial: final[trial]),
        "text_nll": {trial: round(value, 4) for trial, value in sorted(final.items())},
    }


def picture(ways: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Wall time of each way, with its ratio to ours."""
    figure, (axes,) = new_figure()
    names = list(ways)
    values = [ways[way]["wall_s"] for way in names]
    bars = axes.barh([WAYS[way] for way in names], values, color=COLORS[: len(names)])
    labels = [f"{value:.0f} s, {value / ways['ours']['wall_s']:.1f} ×" for value in values]
    axes.bar_label(bars, labels, padding=4)
    axes.set(title="The same trials, from command to end", xlabel="seconds")
    axes.set_xlim(0, 1.25 * max(values))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Run every way --repeats times and compare the final losses; returns each way's figures."""
    names = ["ours", *args.ways]
    times: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, Results] = {}
    trials: list[dict[str, Any]] = []
    apart: dict[str, dict[str, float]] = {}
    for repeat in range(args.repeats):
        here = folder / str(repeat)
        here.mkdir()
        settings, given = settings_file(here, args), here / "trials.json"
        first = repeat % len(names)  # the order rotates; ours is first in repeat 0
        for name in names[first:] + names[:first]:
            if name == "ours":
                times[name].append(timed(name, "--sweep", settings))
                trials, results = our_trials(here / "ours")
            else:
                write_json(given, {"trials": trials})
                out = here / f"{name}.json"
                options = ["--given", given, "--processes", args.processes, "--out", out]
                times[name].append(timed(name, "--sweep", settings, *options))
                results = json.loads(out.read_text())["results"]
            found[name] = results
            apart[name] = compare(losses(found["ours"]), losses(results))
            print(f"{name}: {times[name][-1]:.1f} s; losses apart: {apart[name]}", flush=True)
    steps = sum(trial["stop_at"] for trial in trials)
    ways = {name: summary(times[name], found[name], steps) for name in names}
    for name in args.ways:
        ways[name]["ratio_to_ours"] = ratio(ways[name]["wall_s"], ways["ours"]["wall_s"])
        ways[name]["apart"] = apart[name]
        print(f"{name}: {ways[name]['ratio_to_ours']} × ours; best {ways[name]['best_text_nll']}")
    print(f"ours: {len(trials)} trials, {steps} steps, best {ways['ours']['best_text_nll']}")
    return ways


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument("--trials", type=at_least(1), default=12)
    parser.add_argument("--num-steps", type=at_least(1), default=80)
    parser.add_argument("--report-every", type=at_least(1), default=20)
    parser.add_argument("--clips", type=at_least(1), default=3, help="clips per step")
    parser.add_argument("--val-clips", type=at_least(1), default=16)
    parser.add_argument("--workers", type=at_least(1), default=1, help="our workers")
    parser.add_argument("--slots", type=at_least(1), default=4, help="slots of each of our workers")
    parser.add_argument(
        "--processes", type=at_least(1), default=num_cpus(), help="processes of the other ways"
    )
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0, help="1: on a GPU")
    parser.add_argument("--scheduler", choices=("asha", "none"), default="asha")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=at_least(1), default=3)
    parser.add_argument(
        "--ways", nargs="*", choices=("plain", "strong"), default=["plain", "strong"]
    )
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    inside = parser.add_argument_group("used inside the process of one way")
    for name in ("--way", "--sweep", "--given"):
        inside.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure all ways, or be the process of one way."""
    args = arguments()
    if args.way == "ours":
        run_ours(Path(args.sweep))
    elif args.way:
        run_theirs(args.way, Path(args.sweep), Path(args.given), args.processes, args.out)
    else:
        facts = machine("cuda" if args.gpus else "cpu")
        with tempfile.TemporaryDirectory(prefix="ht") as folder:
            ways = measure(args, Path(folder))
        save(
            args.out, {"machine": facts, "settings": settings_of(args), "ways": ways}, picture(ways)
        )


if __name__ == "__main__":
    run(main)
