"""Which modules a target path means, by their full names, and an exact account of what matched.

PEFT's suffix rules mislead on a DualFFN model: `mlp.up_proj` matches the text path only, `up_proj` both, and
`all-linear` both heads too. So every path is one regex that must match full module names.
"""

import re
from collections.abc import Sequence
from typing import Any, get_args

from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import TargetPath, TrialConfig
from higgs_tune.errors import ConfigError
from higgs_tune.model.new_modules import new_module_shapes

PATTERNS: dict[TargetPath, str] = {
    "attention": r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    "text_mlp": r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "audio_mlp": r"model\.layers\.\d+\.audio_mlp\.(gate|up|down)_proj",
    "text_head": r"text_lm_head",
    "audio_head": r"audio_lm_head",
}
"""Paths trained by LoRA. `audio_attention` is not one: its modules are new and trained in full."""


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
            f"Known paths: {', '.join(get_args(TargetPath))}; text_head needs a base with a text head."
        )
    return found


def account(model: HiggsAudioV2ForConditionalGeneration, config: TrialConfig) -> dict[str, Any]:
    """The modules and parameters that a trial trains, as plain data for its record.

    Returns:
        "parameters": the total. "modules": target path → "num_modules", "num_parameters" (of the LoRA
        factors, or of whole modules for audio_attention) and the names of the "modules".

    Raises:
        ConfigError: a path matches nothing in this model.
    """
    matches: dict[str, dict[str, Any]] = {}
    for path in config.targets:
        if path == "audio_attention":
            new = new_module_shapes(model, config.cross_attention)
            names = {name.rsplit(".", 1)[0] for name in new}
            total = sum(shape.numel() for shape in new.values())
        else:
            linears = linear_modules(model, path)
            names = set(linears)
            total = sum(config.rank * (m.in_features + m.out_features) for m in linears.values())
        matches[path] = {
            "num_modules": len(names),
            "num_parameters": total,
            "modules": sorted(names),
        }
    total = sum(match["num_parameters"] for match in matches.values())
    return {"parameters": total, "modules": matches}
