"""The command `higgs-tune export`; imports no torch until it runs."""

import argparse

from higgs_tune.errors import ConfigError
from higgs_tune.local_path import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "adapter", type=local_path, help="adapter folder of a trial or of a `train` run"
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder to create")
    parser.add_argument(
        "--merge", action="store_true", help="write a whole checkpoint instead of an adapter"
    )
    parser.add_argument(
        "--format",
        choices=("native", "boson"),
        default="native",
        help="native: for transformers (default); boson: for the original code, always merged",
    )
    parser.add_argument(
        "--base", help="embedded, a folder or a Hub id (default: the adapter's base)"
    )
    parser.add_argument("--revision", help="commit of a Hub id (default: the adapter's)")
    parser.add_argument("--device", default="cpu", help="device to merge on (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written. Errors are `HiggsTuneError`s."""
    merge = args.merge or args.format == "boson"
    if not merge and (args.base or args.revision):
        raise ConfigError(
            "--base and --revision: only a merged checkpoint needs the base; add --merge."
        )
    from higgs_tune.train.checkpoint import read_trial
    from higgs_tune.train.export import adapter_base, copy_adapter, export_merged  # torch: slow

    mode = read_trial(args.adapter).cross_attention
    if not merge:
        copy_adapter(args.adapter, args.out)
        how = "peft" if mode == "off" else "higgs_tune.train.checkpoint.load_adapter"
    else:
        settings = adapter_base(args.adapter, args.base, args.revision, args.device)
        base = export_merged(args.adapter, args.out, settings, args.format)
        print(f"merged into {base.source}, {base.model.dtype}")
        how = "transformers, use_text_head=True" if mode == "off" else "higgs_tune.model.load"
        how = "boson_multimodal" if args.format == "boson" else how
    print(f"{args.out}: cross_attention {mode}, loads with {how}")
    return 0
