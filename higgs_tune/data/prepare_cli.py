"""The command `higgs-tune data prepare`; imports torch only when it runs."""

import argparse
import shlex
import signal
import sys
from types import FrameType

from higgs_tune.config_file import validate
from higgs_tune.data.options import PrepareOptions
from higgs_tune.errors import ConfigError
from higgs_tune.local_path import local_path

_OPTIONS = {
    "max_rejected": "rejected rows that are allowed: below 1 a share, else a count",
    "val_fraction": "share of the clips for validation, if the manifest has no split column",
    "min_seconds": "shortest recording, in seconds",
    "max_seconds": "longest recording, in seconds",
    "max_text_chars": "longest text of one part, in characters",
    "seed": "seed of the split",
    "rows_per_shard": "rows in one shard; an interrupted run keeps whole shards only",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("manifest", type=local_path, help=".jsonl, .json, .csv, .tsv or .parquet")
    parser.add_argument("--out", type=local_path, required=True, help="folder of the dataset")
    parser.add_argument(
        "--data-root", type=local_path, help="folder of the recordings (default: the manifest's)"
    )
    parser.add_argument(
        "--codec", default="embedded", help='"embedded", a folder or a Hub id (default: embedded)'
    )
    parser.add_argument("--codec-revision", help="commit of a Hub id")
    parser.add_argument(
        "--device",
        default="auto",
        help="where the codec runs: auto, cpu, cuda or cuda:N (default: auto)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes with a codec each; 1 encodes in this process, more start (or join) Ray and "
        "share the GPUs, or without GPUs take one CPU each (default: 1)",
    )
    parser.add_argument(
        "--clips-from-chat",
        action="store_true",
        help="turn chats that only wrap a recording and its text into clips, which train every task",
    )
    for name, text in _OPTIONS.items():
        default = PrepareOptions.model_fields[name].default
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=default, help=f"{text} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    """Prepare the dataset and print what is in it. Errors are `HiggsTuneError`s."""
    raw = {name: getattr(args, name) for name in _OPTIONS}
    raw["clips_from_chat"] = args.clips_from_chat
    options = validate(PrepareOptions, raw, "data prepare")
    if args.workers < 1:
        raise ConfigError(f"--workers: found {args.workers}, needed at least 1.")
    from higgs_tune.data.encode import REJECTED_NAME, prepare  # torch: seconds to import

    def say(number: int, frame: FrameType | None) -> None:
        print("interrupted: stopping the workers, which takes some seconds", file=sys.stderr)
        raise KeyboardInterrupt

    former = signal.getsignal(signal.SIGINT)
    if args.workers > 1 and former is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, say)
    try:
        info = prepare(
            args.manifest,
            args.out,
            codec=args.codec,
            codec_revision=args.codec_revision,
            device=args.device,
            num_workers=args.workers,
            data_root=args.data_root,
            options=options,
        )
    except KeyboardInterrupt:
        print(
            f"interrupted; the same command continues: finished shards of {options.rows_per_shard} rows "
            f"are kept in {args.out}",
            file=sys.stderr,
        )
        return 130
    finally:
        signal.signal(signal.SIGINT, former)
    counts = ", ".join(f"{count} {split}" for split, count in info.splits.items())
    print(f"{args.out}: {info.num_rows} rows ({counts}), {info.hours:.2f} h of audio")
    revision = f", revision {info.codec.revision}" if info.codec.revision else ""
    print(f"codec {info.codec.id}{revision}, weights {(info.codec.weights_sha256 or '')[:12]}")
    print(f"split: {info.split_rule}")
    if info.num_rejected:
        print(f"{info.num_rejected} rows were left out, see {args.out / REJECTED_NAME}")
    print(f"content hash {info.content_hash}")
    if info.splits["validation"]:
        base = "" if args.codec == "embedded" else "--base BASE "
        print(f"next: higgs-tune check {base}--data {shlex.quote(str(args.out))}")
    return 0
