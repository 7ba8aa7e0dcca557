"""Count the operations that a pack's step sends to a GPU, without having one.

    python benchmarks/pack_ops.py --out results/pack_ops.json

The full-size base is shapes without values and the GPU is simulated (stand_in_gpu.py), so this runs anywhere,
in minutes. What is one operation on a GPU, such as attention or a norm, counts as one. Each operation costs
the host some microseconds, however small it is; where that takes longer than the matmuls, the GPU waits for
the host. Packs of equal adapters and of unlike ones (ranks and target paths in turn, because a search mixes
them) are counted with shared matmuls, as on a GPU, and with separate ones for each adapter. Views and
allocations launch no kernel and are not counted.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from gpu_step import H100_FLOPS
from matplotlib.figure import Figure
from options import ascending, at_least, json_file, new_parser, run
from output import COLORS, machine, new_figure, save, settings_of
from random_base import PRESETS, random_clips, step_flops, vocabulary_of
from stand_in_gpu import ensure_preloaded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from higgs_tune.config import ALL_LINEAR, TargetPath, TrialConfig
from higgs_tune.data.collate import count_targets
from higgs_tune.model.load import Base
from higgs_tune.train.engine import Engine
from higgs_tune.train.memory import empty_model
from higgs_tune.train.residents import PackLimits

_MAKES_NO_KERNEL = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::_unsafe_view",
    "prim::device",
}
_UNLIKE: Sequence[tuple[int, tuple[TargetPath, ...]]] = (
    (16, ALL_LINEAR),
    (8, ("text_mlp", "audio_mlp")),
    (32, (*ALL_LINEAR, "text_head")),
    (64, ("attention", "text_mlp", "text_head")),
)


class Operations(TorchDispatchMode):
    """Counts operations that compute or copy, in forward, backward and optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Count the operation and run it."""
        self.count += not (func.is_view or func.name().partition(".")[0] in _MAKES_NO_KERNEL)
        return func(*args, **(kwargs or {}))


def trials_of(adapters: int, *, unlike: bool) -> list[TrialConfig]:
    """A pack's trials: all alike, or with several ranks and target paths in turn."""
    return [
        TrialConfig(
            rank=rank,
            alpha=32.0,
            targets=targets,
            learning_rate=1e-4,
            num_steps=100,
            report_every_steps=10,
        )
        for n in range(adapters)
        for rank, targets in [_UNLIKE[n % len(_UNLIKE) if unlike else 0]]
    ]


def count(base: Base, trials: Sequence[TrialConfig], tokens: int, *, share: bool) -> int:
    """Operations of one optimizer step of the whole pack."""
    limits = PackLimits.of(trials, num_slots=len(trials))
    engine = Engine(base, limits, share_matmuls=share)
    names = [str(n) for n in range(len(trials))]
    for name, trial in zip(names, trials, strict=True):
        engine.add(name, trial)
    examples = {n: random_clips(base, 1, tokens, 0.15, (n,)) for n in range(len(trials))}
    counts = {n: count_targets(own, engine.num_codebooks) for n, own in examples.items()}
    batch = engine.batch(examples)
    with Operations() as operations:
        engine.forward_backward(batch, counts)
        engine.optim_step(names)
    return operations.count


def compare(base: Base, adapters: int, tokens: int) -> dict[str, Any]:
    """Operations of packs of equal and of unlike adapters, with shared and with separate matmuls."""
    pack: dict[str, Any] = {"adapters": adapters}
    for kind in ("alike", "unlike"):
        trials = trials_of(adapters, unlike=kind == "unlike")
        for way, share in (("apart", False), ("shared", True)):
            pack[f"{kind}_{way}"] = count(base, trials, tokens, share=share)
    one = random_clips(base, 1, tokens, 0.15, (0,))
    flops = adapters * step_flops(base.model.config, 16, one)
    pack["floor_h100_ms"] = round(1000 * flops / H100_FLOPS, 1)
    pack["unlike_ratio"] = round(pack["unlike_apart"] / pack["unlike_shared"], 2)
    return pack


def picture(packs: Sequence[dict[str, Any]]) -> Figure:
    """Operations over the number of adapters."""
    figure, (axes,) = new_figure()
    lines = {
        "unlike_apart": "unlike, each its own matmuls",
        "unlike_shared": "unlike, shared matmuls",
        "alike_shared": "alike, shared matmuls",
    }
    for color, (name, label) in zip(COLORS, lines.items(), strict=False):
        numbers = [pack["adapters"] for pack in packs], [pack[name] for pack in packs]
        axes.plot(*numbers, marker="o", color=color, label=label)
    axes.set(title="Operations of one step of the pack", xlabel="adapters", ylim=(0, None))
    axes.legend()
    return figure


def main() -> None:
    """Count, print a line for each pack, write JSON and a picture."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--adapters", type=ascending, default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=at_least(1), default=600, help="rows of an adapter's step")
    parser.add_argument("--out", type=json_file, help="JSON file; the picture is saved beside it")
    args = parser.parse_args()
    ensure_preloaded()
    config = PRESETS[args.preset]
    packs: list[dict[str, Any]] = []
    result = {"machine": machine(), "settings": settings_of(args), "packs": packs}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = empty_model(config, torch.bfloat16)
        base = Base(model, None, vocabulary_of(config), "random")  # type: ignore[arg-type]
        for adapters in args.adapters:
            packs.append(compare(base, adapters, args.tokens))
            print(json.dumps(packs[-1]), flush=True)
    save(args.out, result, picture(packs))


if __name__ == "__main__":
    run(main)
