"""Which modules a target path means, by anchored names, with an exact account of what matched.

Suffix rules go wrong on a DualFFN model: `mlp.up_proj` hits the text path only, `up_proj` both, and
`all-linear` both heads too. So every path is one full-match regex over full module names.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from higgs_tune.config import TargetPath
from higgs_tune.errors import ConfigError

PATTERNS: dict[TargetPath, str] = {
    "attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "text_mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "audio_mlp": r"model\.layers\.\d+\.audio_mlp\.(gate|up|down)_proj",
    "text_head": r"text_lm_head",
    "audio_head": r"audio_lm_head",
}
"""Paths trained by LoRA. `audio_attention` is not here: its modules are new, so they train whole."""


@dataclass(frozen=True)
class Match:
    """What one target path matched."""

    num_modules: int
    num_parameters: int  # trainable: LoRA factors, or whole modules for audio_attention
    modules: tuple[str, ...]


def lora_regex(targets: Sequence[TargetPath]) -> str:
    """The `target_modules` regex of a `peft.LoraConfig` for these paths."""
    return "|".join(f"(?:{PATTERNS[path]})" for path in targets if path in PATTERNS)


def linear_modules(model: nn.Module, path: TargetPath) -> dict[str, nn.Linear]:
    """The linear modules that a LoRA path matches, in the model's order.

    Raises:
        ConfigError: the path matches nothing in this model.
    """
    pattern = re.compile(PATTERNS[path])
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.fullmatch(name)
    }
    if not found:
        raise ConfigError(
            f"targets: {path} matches no module of {type(model).__name__}. "
            f"Known paths: {', '.join(get_args(TargetPath))}; a text_head needs a base loaded with one."
        )
    return found


def lora_parameters(linear: nn.Linear, rank: int) -> int:
    """Trainable parameters of one LoRA pair."""
    return rank * (linear.in_features + linear.out_features)


def account(matches: dict[TargetPath, Match]) -> dict[str, Any]:
    """Plain data for a trial's record."""
    return {
        "parameters": sum(match.num_parameters for match in matches.values()),
        "modules": {path: asdict(match) for path, match in matches.items()},
    }
