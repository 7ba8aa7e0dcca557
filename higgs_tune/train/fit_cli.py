"""The command `higgs-tune fit`: will a sweep's trials fit on a GPU? Loads no weights."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from higgs_tune.config import BaseSettings, SweepConfig
from higgs_tune.config_file import load_sweep
from higgs_tune.config_steps import num_checkpoints
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.local_path import local_path

if TYPE_CHECKING:
    from transformers import HiggsAudioV2Config

PUBLISHED_BASE = "bosonai/higgs-audio-v2-generation-3B-base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", type=local_path, required=True, help="YAML of a sweep")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting; may be given again",
    )
    parser.add_argument(
        "--base-config", type=local_path, help="config.json of the base (default: the sweep's base)"
    )
    parser.add_argument("--gpu-gib", type=float, default=80.0, help="memory of a GPU (default: 80)")
    parser.add_argument(
        "--clip-rows",
        type=int,
        default=400,
        help="text and audio rows of one clip (default: 400, about 13 s of audio with its text)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the memory of one slot and of the sweep's slots, and how many fit; raises if none does."""
    config = load_sweep(args.config, args.set)
    if args.clip_rows < 8 or args.gpu_gib <= 0:
        raise ConfigError("--clip-rows must be at least 8 and --gpu-gib above 0.")
    found = fit(config, args.base_config, args.gpu_gib, args.clip_rows)
    print(json.dumps(found, indent=1) if args.json else _table(found, args.gpu_gib))
    if not found["slots_that_fit"]:
        total = found["slots"]["1"]["total"] / (1 << 30)
        raise ConfigError(
            f"{args.config}: one slot takes {total:.2f} GiB and does not fit into {args.gpu_gib:g} GiB, of "
            f"which {found['reserve']:.0%} are kept free. Lower train.token_budget, space.rank or what the "
            "target sets and cross_attention add (with space.cross_attention off, also leave out trial 1: "
            "baseline.with_audio_self false), use base.dtype bfloat16, or a larger GPU."
        )
    return 0


def fit(
    config: SweepConfig, base_config: Path | None, gpu_gib: float, clip_rows: int
) -> dict[str, Any]:
    """Predict the bytes needed with one slot and with the sweep's slots, and how many slots fit."""
    import torch  # slow

    from higgs_tune.train.capacity import largest, most_clips, most_parameters, predict_modes
    from higgs_tune.train.memory import (
        GIB,
        RESERVE,
        StepShape,
        memory_of_slots,
        slots_that_fit,
    )

    shape = base_shape(config.base, base_config)
    step = StepShape.of(most_clips(config), clip_rows, config.train.token_budget)
    ones, twos = (predict_modes(config, shape, n, step) for n in (1, 2))
    fitting = slots_that_fit(ones, twos, int(gpu_gib * GIB))
    setting = config.tune.slots_per_worker
    wanted = max(1, fitting) if setting == "auto" else setting
    confirm = config.confirm
    repeats = confirm.num_seeds * (1 + confirm.num_configs) if confirm.num_configs else 0
    by_slots = {
        n: largest(memory_of_slots(one, two, n) for one, two in zip(ones, twos, strict=True))
        for n in sorted({1, wanted})
    }
    return {
        "dtype": config.base.dtype,
        "rows_per_adapter": step.num_rows,
        "micro_batches": step.num_micro_batches,
        "slots": {
            str(n): asdict(memory) | {"total": memory.total} for n, memory in by_slots.items()
        },
        "gpu_gib": gpu_gib,
        "reserve": RESERVE,
        "slots_that_fit": fitting,
        "slots_per_worker": setting,
        # float32 weights, each with Adam's two moments while the trial trains
        "checkpoint": 12 * most_parameters(config, shape),
        "checkpoints_kept": config.tune.num_trials * num_checkpoints(config) + repeats,
        "torch": torch.__version__,
    }


def base_shape(base: BaseSettings, path: Path | None) -> "HiggsAudioV2Config":
    """The base's configuration, from a file, a folder or the Hub; loads no weights.

    Raises:
        ConfigError: a Hub id without a revision.
        ModelError: no such file, or not the configuration of a Higgs Audio V2 model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import HiggsAudioV2Config

    from higgs_tune.model.load import locate, on_one_line, read_config
    from higgs_tune.model.snapshot import read_object

    if path is not None:
        raw = read_object(path)
        if raw.get("model_type") != HiggsAudioV2Config.model_type:
            raise ModelError(
                f"{path}: model_type is {raw.get('model_type')!r}, needed "
                f"{HiggsAudioV2Config.model_type!r}."
            )
        try:
            return HiggsAudioV2Config.from_dict(raw)
        except StrictDataclassError as error:
            raise ModelError(f"{path}: {on_one_line(error)}") from error
    if base.path == PUBLISHED_BASE and not Path(base.path).exists():
        # it has the class's default sizes, except that codebook_size includes the two stream ids
        return HiggsAudioV2Config(codebook_size=1026)
    return read_config(locate(base, weights=False)[1])[0]


def _table(found: dict[str, Any], gpu_gib: float) -> str:
    columns = list(found["slots"])
    heads = [f"{n} slot{'s' if n != '1' else ''}" for n in columns]
    lines = ["GiB".ljust(14) + "".join(head.rjust(10) for head in heads)]
    for part in found["slots"]["1"]:
        values = (found["slots"][n][part] / (1 << 30) for n in columns)
        lines.append(part.ljust(14) + "".join(f"{value:10.2f}" for value in values))
    batches = found["micro_batches"]
    often = f", {batches} forwards per step" if batches > 1 else ""
    lines.append(f"{found['rows_per_adapter']} rows of each adapter in one forward{often}")
    fitting, wanted = found["slots_that_fit"], found["slots_per_worker"]
    lines.append(f"{gpu_gib:g} GiB hold {fitting} slots, {found['reserve']:.0%} kept free")
    if wanted != "auto" and wanted > fitting > 0:
        advice = "Lower it, train.token_budget, or what the target sets and cross_attention add."
        lines.append(f"tune.slots_per_worker is {wanted}: too many. {advice}")
    size, kept = found["checkpoint"] / (1 << 30), found["checkpoints_kept"]
    lines.append(
        f"a checkpoint of the largest trial takes {size:.2f} GiB, a third of that once it has ended"
    )
    lines.append(f"results_dir takes up to {size * kept:.3g} GiB for {kept} checkpoints")
    return "\n".join(lines)
