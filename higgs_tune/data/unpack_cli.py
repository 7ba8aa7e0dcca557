"""The command `higgs-tune data unpack`."""

import argparse
import shlex

from higgs_tune.local_path import local_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "files",
        type=local_path,
        nargs="+",
        metavar="FILE.parquet",
        help="files of one Hugging Face dataset, or others with structs of bytes and path",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, help="folder of the recordings and their manifest"
    )


def run(args: argparse.Namespace) -> int:
    """Write recordings and manifest, and print how to go on. Errors are `DataError`s."""
    from higgs_tune.data.unpack import unpack  # pyarrow: slow to import

    found = unpack(args.files, args.out)
    print(f"{found.manifest}: {found.num_rows} rows, {found.num_recordings} recordings beside it")
    print(f"next: higgs-tune data prepare {shlex.quote(str(found.manifest))} --out prepared")
    return 0
