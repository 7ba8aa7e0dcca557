"""Initial weights of an adapter."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import TargetPath, TrialConfig
from higgs_tune.model.adapter_layout import Linears
from higgs_tune.model.new_modules import initial_new_modules


def initial_weights(
    model: HiggsAudioV2ForConditionalGeneration,
    groups: Iterable[tuple[TargetPath, Linears]],
    config: TrialConfig,
) -> dict[str, Tensor]:
    """Full names → initial weights of an adapter, float32 on the CPU.

    LoRA starts as in PEFT (A uniform, B zero). All draws depend on the config only, not on the rest of the
    pack. Includes the new modules of the config's cross_attention.

    Args:
        groups: from `groups.lora_groups`, with at least the adapter's targets.
    """
    generator = torch.Generator().manual_seed(config.seed)
    weights: dict[str, Tensor] = {}
    for path, group in groups:
        if path not in config.targets:
            continue
        for name, linear in group.items():
            bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = sqrt(5)
            a = torch.empty(config.rank, linear.in_features)
            weights[f"{name}.lora_A.weight"] = a.uniform_(-bound, bound, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.zeros(linear.out_features, config.rank)
    if config.cross_attention != "off":
        weights |= initial_new_modules(model, config.cross_attention, config.seed)
    return weights
