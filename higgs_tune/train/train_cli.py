"""The command `higgs-tune train`; imports no torch until it runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from higgs_tune.config import BaseSettings, DataSettings, RunSettings, Settings, TrialConfig
from higgs_tune.config_file import apply_overrides, read_yaml, validate
from higgs_tune.errors import ConfigError, did_you_mean
from higgs_tune.local_path import local_path


class _Training(Settings):
    """The sections of a configuration file for this command."""

    base: BaseSettings
    data: DataSettings
    trial: TrialConfig
    run: RunSettings


SECTIONS = tuple(_Training.model_fields)
# What best_config.yaml also records, about the sweep that found it; training ignores it.
RECORDS = ("higgs_tune", "lora_config", "results", "command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--config",
        type=local_path,
        required=True,
        help="best_config.yaml of a sweep, or a file like it",
    )
    parser.add_argument("--data", help="dataset folder, instead of the configuration's")
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("trained"),
        help="folder of the run (default: trained)",
    )
    parser.add_argument("--start-from", metavar="DIR", help="adapter whose weights to start from")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="resume from --out's last checkpoint")
    again.add_argument(
        "--auto-resume", action="store_true", help="resume if --out holds a run, else start one"
    )
    parser.add_argument("--seed", type=int, help="seed, instead of the configuration's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting, e.g. --set run.save_every_steps=500; may be given again",
    )


def read_settings(args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The checked settings of each section, and the content hash that the file records for its data.

    Raises:
        ConfigError: a section is missing or unknown, or a setting is unknown or out of bounds.
    """
    raw = read_yaml(args.config)
    if "space" in raw and "trial" not in raw:
        raise ConfigError(
            f"{args.config}: holds a sweep, needed one configuration, such as the best_config.yaml that a "
            f"sweep writes. Search with higgs-tune sweep --config {args.config}."
        )
    for section in raw:
        if section not in (*SECTIONS, *RECORDS):
            raise ConfigError(f"{args.config}: {_unknown(section)}")
    missing = [key for key in ("base", "data", "trial") if not isinstance(raw.get(key), dict)]
    if missing:
        raise ConfigError(
            f"{args.config}: section {missing[0]} is missing. "
            "Give a best_config.yaml that a sweep wrote."
        )
    for text in args.set:
        section = text.split("=")[0].split(".")[0]
        if section not in SECTIONS:
            raise ConfigError(f"--set {text}: {_unknown(section)}")
    raw = apply_overrides(raw, args.set)
    data, trial = raw["data"], raw["trial"]
    expected = None
    if isinstance(data, dict):  # otherwise it is refused below; so is `trial`
        expected = data.pop("content_hash", None)
        data |= {"path": args.data} if args.data else {}
    if isinstance(trial, dict) and args.seed is not None:
        trial["seed"] = args.seed
    given = {name: raw.get(name) for name in SECTIONS} | {"run": raw.get("run") or {}}
    if args.start_from is not None and isinstance(given["run"], dict):
        given["run"]["start_from"] = args.start_from
    return dict(validate(_Training, given, str(args.config))), expected


def _unknown(section: object) -> str:
    """The end of an error message about a section that this command does not have."""
    near = did_you_mean(str(section), SECTIONS)
    return f"unknown section {section!r}{near}; known here: {', '.join(SECTIONS)}."


def run(args: argparse.Namespace) -> int:
    """Train the configuration of a best_config.yaml. Errors are `HiggsTuneError`s."""
    settings, expected = read_settings(args)
    from higgs_tune.data.dataset import Dataset  # imports torch and more: slow
    from higgs_tune.train.display import Display
    from higgs_tune.train.parallel import join_world, leave_world
    from higgs_tune.train.recorder import Watcher
    from higgs_tune.train.run_folder import SETTINGS
    from higgs_tune.train.single import train_single

    dataset = Dataset.open(settings["data"].path)
    found = dataset.info.content_hash
    world, device = join_world(settings["base"].device, settings["base"].dtype)
    if world.is_main and expected and found != expected:
        print(
            f"note: {settings['data'].path} is not the search's data "
            f"(content hash {found[:12]}, not {expected[:12]}): figures will differ.",
            file=sys.stderr,
        )
    with Display(settings["trial"].num_steps) as display:
        result = train_single(
            **settings,
            out=args.out,
            dataset=dataset,
            resume=args.resume or (args.auto_resume and (args.out / SETTINGS).exists()),
            watcher=Watcher(display.line, display.step, display.samples),
            world=world,
            device=device,
        )
    leave_world(world)
    if result["status"] == "cancelled":
        if world.is_main:
            print(
                f"{result['reason']} after step {result['step']}; go on with --resume",
                file=sys.stderr,
            )
        return 128 + result["signal"]
    if world.is_main:
        if result["status"] != "completed":
            ended = f"{result['status']} at step {result['step']}: {result['reason']}"
            print(f"error: {ended}", file=sys.stderr)
        adapter, best = args.out / "adapter", args.out / "best_adapter"
        print(f"adapter: {adapter if adapter.is_dir() else 'none: no checkpoint was reached'}")
        tolerance = settings["run"].audio_tolerance
        none = f"none: no report kept audio within run.audio_tolerance ({tolerance:g})"
        print(f"best adapter: {best if best.is_dir() else none}")
    return 0 if result["status"] == "completed" else 1
