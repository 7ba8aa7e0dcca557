"""The base's linears by LoRA path, those that share an input as one group."""

from typing import cast

from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2DecoderLayer

from higgs_tune.config import TargetPath
from higgs_tune.model.adapter_layout import Linears
from higgs_tune.model.targets import linear_modules


def _group(prefix: str, module: nn.Module, names: tuple[str, ...]) -> Linears:
    return {f"{prefix}.{name}": getattr(module, name) for name in names}


def decoder_layers(base: HiggsAudioV2ForConditionalGeneration) -> list[HiggsAudioV2DecoderLayer]:
    """The decoder's layers, typed."""
    return cast("list[HiggsAudioV2DecoderLayer]", list(base.model.layers))


def layer_groups(index: int, layer: HiggsAudioV2DecoderLayer) -> dict[TargetPath, list[Linears]]:
    """LoRA path → the layer's linears, grouped by shared input."""
    prefix = f"model.layers.{index}"
    attention = layer.self_attn
    return {
        "attention": [
            _group(f"{prefix}.self_attn", attention, ("q_proj", "k_proj", "v_proj")),
            _group(f"{prefix}.self_attn", attention, ("o_proj",)),
        ],
        "text_mlp": [
            _group(f"{prefix}.mlp", layer.mlp, ("gate_proj", "up_proj")),
            _group(f"{prefix}.mlp", layer.mlp, ("down_proj",)),
        ],
        "audio_mlp": [
            _group(f"{prefix}.audio_mlp", layer.audio_mlp, ("gate_proj", "up_proj")),
            _group(f"{prefix}.audio_mlp", layer.audio_mlp, ("down_proj",)),
        ],
    }


def head_groups(base: HiggsAudioV2ForConditionalGeneration) -> dict[TargetPath, Linears]:
    """LoRA path → the head as a group."""
    assert base.text_lm_head is not None
    return {
        "text_head": {"text_lm_head": base.text_lm_head},
        "audio_head": {"audio_lm_head": base.audio_lm_head},
    }


def lora_groups(
    base: HiggsAudioV2ForConditionalGeneration, paths: frozenset[TargetPath]
) -> list[tuple[TargetPath, Linears]]:
    """Every input group of the adapted paths, in the forward's order.

    `model.targets` defines which linears belong to a path; an assertion checks that the groups agree.
    """
    groups: list[tuple[TargetPath, Linears]] = []
    for index, layer in enumerate(decoder_layers(base)):
        for path, layer_linears in layer_groups(index, layer).items():
            groups.extend((path, group) for group in layer_linears if path in paths)
    for path, group in head_groups(base).items():
        if path in paths:
            groups.append((path, group))
    for path in paths - {"audio_attention"}:
        named = {name for p, group in groups if p == path for name in group}
        assert named == set(linear_modules(base, path)), path
    return groups
