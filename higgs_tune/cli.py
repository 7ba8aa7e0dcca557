"""The `higgs-tune` command. Each subcommand imports what it needs when it runs.

Exit codes: 0 done; 1 unexpected; 2 bad input (one line says what and where); 3 the sweep ended without
a best configuration: nothing feasible ran the full budget, or none held up in the confirm stage; 130, 143
and 129 ended by Ctrl-C, SIGTERM or a closed terminal, with the results so far exported.
"""

import argparse
import atexit
import gc
import importlib.metadata
import io
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_tune.config import BaseSettings, DataSettings, SweepConfig
from higgs_tune.config_file import load_sweep, validate
from higgs_tune.data import prepare_cli, unpack_cli
from higgs_tune.errors import HiggsTuneError, is_out_of_memory, reason_of
from higgs_tune.listen import commands as listen
from higgs_tune.local_path import local_path
from higgs_tune.train import export_cli, fit_cli, train_cli

if TYPE_CHECKING:
    from higgs_tune.report.summary import Summary

BAD_INPUT = 2
# Advice after a system error, such as a full disk, for which no command has a message of its own.
_KEPT = "What a sweep found is kept in its results folder; `higgs-tune report DIR` writes the report again."
_AGAIN = "Fix that and run the command again."
_SMALLER = "Free some, use smaller batches or another device, and run the command again."
DEFAULT_SWEEP = Path("sweeps/quick.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code."""
    os.environ.setdefault("TQDM_DELAY", "1")  # show transformers' bars only after 1 s
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # else a dash ends a sweep in a Latin-1 locale
    parser = argparse.ArgumentParser(
        prog="higgs-tune", description="LoRA sweeps for Higgs Audio V2"
    )
    parser.add_argument("--version", action="version", version=f"higgs-tune {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sweep = commands.add_parser("sweep", help="search for the best configuration")
    add_sweep_arguments(sweep)
    sweep.set_defaults(run=run_sweep_command)

    data = commands.add_parser("data", help="prepare datasets")
    datasets = data.add_subparsers(required=True, metavar="COMMAND")
    prepare = datasets.add_parser("prepare", help="encode a manifest's recordings once")
    prepare_cli.add_arguments(prepare)
    prepare.set_defaults(run=prepare_cli.run)
    unpack = datasets.add_parser("unpack", help="write the recordings that Parquet files hold")
    unpack_cli.add_arguments(unpack)
    unpack.set_defaults(run=unpack_cli.run)

    train = commands.add_parser("train", help="train one configuration, such as a sweep's best")
    train_cli.add_arguments(train)
    train.set_defaults(run=train_cli.run)

    generate = commands.add_parser("generate", help="speak a text with the base or an adapter")
    listen.add_generate_arguments(generate)
    generate.set_defaults(run=listen.run_generate)

    evaluate = commands.add_parser(
        "evaluate", help="generate held-out clips with adapters; measure and listen to them"
    )
    listen.add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=listen.run_evaluate)

    fit = commands.add_parser("fit", help="predict the memory of a sweep; loads no weights")
    fit_cli.add_arguments(fit)
    fit.set_defaults(run=fit_cli.run)

    report = commands.add_parser("report", help="write a sweep's report again")
    report.add_argument("results", type=local_path, help="results folder of a sweep")
    report.set_defaults(run=run_report)

    export = commands.add_parser("export", help="export an adapter, as it is or merged")
    export_cli.add_arguments(export)
    export.set_defaults(run=export_cli.run)

    check = commands.add_parser("check", help="probe base and data for leaks and misaligned labels")
    check.add_argument(
        "--base", default="embedded", help="embedded (default), a folder or a Hub id"
    )
    check.add_argument("--revision", help="commit of a Hub id")
    check.add_argument(
        "--text-head",
        default="checkpoint",
        help="for a base without a text head: checkpoint (default) refuses the base, from_embedding starts "
        "the head from the token embedding",
    )
    check.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    check.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    check.add_argument(
        "--data",
        default="embedded:arabic",
        help="dataset folder or embedded:NAME (default: embedded:arabic)",
    )
    check.set_defaults(run=run_check)

    atexit.register(gc.freeze)  # skips the final garbage collection, which takes seconds with torch
    return guarded(parser.parse_args(argv))


def _version() -> str:
    try:
        return importlib.metadata.version("higgs-tune")
    except importlib.metadata.PackageNotFoundError:
        return "of a checkout that is not installed"


def guarded(args: argparse.Namespace) -> int:
    """Run the chosen command; an error that the user can fix prints one line, not a traceback."""
    try:
        return args.run(args)
    except HiggsTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        if end.code != signal.SIGTERM:  # what Ray's handler exits with
            raise
        print("interrupted", file=sys.stderr)
        return 143
    except BrokenPipeError:  # `| head`; the results are in files
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        of_sweep = args.run in (run_sweep_command, run_report)
        print(f"error: {reason_of(error)}. {_KEPT if of_sweep else _AGAIN}", file=sys.stderr)
        return BAD_INPUT
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: not enough memory: {error}. {_SMALLER}", file=sys.stderr)
        return BAD_INPUT


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `higgs-tune sweep` and `sweeps/run.py`."""
    parser.add_argument(
        "--config",
        type=local_path,
        help=f"YAML of a sweep (default: {DEFAULT_SWEEP}; with --resume, the sweep's own settings)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting, e.g. --set tune.num_trials=32; may be given again",
    )
    parser.add_argument(
        "--name", help="results folder (default: the YAML's name, numbered if taken)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="resume that sweep; without --name, the newest one",
    )
    again.add_argument(
        "--auto-resume",
        action="store_true",
        help="resume that sweep if it has begun, else start it; without --name, the YAML's name",
    )


def run_sweep_command(args: argparse.Namespace) -> int:
    """Search, then report."""
    config = _sweep_config(args)
    from higgs_tune.sweep.driver import EXIT_NOTHING_FEASIBLE, run_sweep

    outcome = run_sweep(config, resume=args.resume, command=sys.argv)
    from higgs_tune.report.build import build_report

    summary = build_report(outcome.results)
    _show_summary(summary)
    if outcome.exit_code > 128:  # a signal ended it
        print(
            f"interrupted; to go on, run the same command with --resume --name {outcome.results.name}",
            file=sys.stderr,
        )
    if outcome.exit_code == 0 and summary.best_id is None:
        return EXIT_NOTHING_FEASIBLE
    return outcome.exit_code


def _show_summary(summary: "Summary") -> None:
    """Print the summary as text; if stdout is not a terminal, as a JSON line there and text to stderr."""
    if sys.stdout.isatty():
        print(summary.text)
        return
    from higgs_tune.sweep.live import Display

    Display().event("summary", **summary.facts)
    print(summary.text, file=sys.stderr)


def _sweep_config(args: argparse.Namespace) -> SweepConfig:
    """The settings of the sweep that the arguments ask for; decides `args.resume` for --auto-resume."""
    if args.auto_resume:
        from higgs_tune.sweep.folder import is_free

        config = load_sweep(args.config or DEFAULT_SWEEP, args.set)
        args.name = args.name or config.name
        folder = config.results_root / args.name
        args.resume = (folder / "sweep.yaml").exists() and not is_free(folder)
    if args.config is not None or not args.resume:
        config = load_sweep(args.config or DEFAULT_SWEEP, args.set)
        where = {"name": args.name or _pick_name(config, resume=args.resume)}
    else:
        place = [text for text in args.set if text.startswith(("name=", "results_dir="))]
        config = load_sweep(DEFAULT_SWEEP, place)
        where = {"name": args.name or _pick_name(config, resume=True)}
        where["results_dir"] = config.results_dir  # the stored one is wrong after a move
        stored = config.results_root / where["name"] / "sweep.yaml"
        if stored.exists():
            others = [text for text in args.set if text not in place]
            config = load_sweep(stored, others)
    return validate(SweepConfig, config.model_dump() | where, "--name")


def _pick_name(config: SweepConfig, *, resume: bool) -> str:
    """The results folder's name: the YAML's, numbered if taken; with --resume, the newest with trials."""
    from higgs_tune.sweep.folder import is_free

    pattern = re.compile(rf"{re.escape(config.name)}(?:-(\d+))?")
    folder = config.results_root
    there = {
        int(match[1] or 1): entry
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if (match := pattern.fullmatch(entry.name))
    }
    if resume:  # a start that was refused leaves a folder without trials
        begun = [number for number, entry in there.items() if (entry / "trials").is_dir()]
        number = max(begun or there, default=0)
    else:
        number = max((n for n, entry in there.items() if not is_free(entry)), default=0) + 1
    return config.name if number <= 1 else f"{config.name}-{number}"


def run_report(args: argparse.Namespace) -> int:
    """Rebuild the report of a results folder."""
    from higgs_tune.report.build import build_report

    print(build_report(args.results).text)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Run the probes, and print their findings and the base's validation metrics."""
    from higgs_tune.train.loop import PackLoop
    from higgs_tune.train.residents import PackLimits

    base = validate(BaseSettings, listen.given_settings(args, listen.BASE), "check")
    data = validate(DataSettings, {"path": args.data}, "check --data")
    loop = PackLoop.load(base, data, PackLimits.of([], num_slots=1))
    print(json.dumps({"preflight": loop.preflight, "base": loop.base_metrics}, indent=1))
    print("no leak: no label's loss changes with its own input", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
