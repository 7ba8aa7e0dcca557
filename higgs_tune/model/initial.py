"""The weights that an adapter starts from."""

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
    """Full names → first weights of an adapter, float32 on the CPU.

    PEFT's start (A uniform, B zero), drawn from the seed whatever else is in the pack, and the new
    modules of its cross_attention.

    Args:
        groups: `groups.lora_groups` of the model, at least of the adapter's targets.
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
