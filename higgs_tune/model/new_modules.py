"""The modules that each cross-attention mode adds to a base: names, shapes and initial weights.

Initially they leave every output unchanged: `o_proj` is 0, and audio_self's extra norm is a copy of
`audio_input_layernorm`.
"""

import torch
from torch import Tensor
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import CrossAttention

MODULE_NAMES: dict[CrossAttention, tuple[str, ...]] = {
    "off": (),
    "audio_self": ("audio_attn", "audio_post_audio_attn_layer_norm"),
    "text_to_audio": ("text_audio_attn",),
}
"""New modules of each decoder layer, as attribute names."""


def new_module_shapes(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention
) -> dict[str, torch.Size]:
    """Full names → shapes of the new modules' weights, in the order in which they are initialised."""
    shapes: dict[str, torch.Size] = {}
    for index, layer in enumerate(base.model.layers):
        for module_name in MODULE_NAMES[mode]:
            prefix = f"model.layers.{index}.{module_name}"
            if module_name.endswith("layer_norm"):
                norm = layer.get_parameter("audio_input_layernorm.weight")
                shapes[f"{prefix}.weight"] = norm.shape
                continue
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = layer.get_parameter(f"self_attn.{name}.weight")
                shapes[f"{prefix}.{name}.weight"] = weight.shape
    return shapes


def initial_new_modules(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention, seed: int
) -> dict[str, Tensor]:
    """Full names → initial weights of the new modules, float32 on the CPU.

    q, k and v are normal with the checkpoint's initializer_range as standard deviation, and o is 0. The
    norm copies `audio_input_layernorm`, because with another one the output would change even if o is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    std = base.config.initializer_range
    for name, shape in new_module_shapes(base, mode).items():
        if name.endswith("layer_norm.weight"):
            index = int(name.split(".")[2])
            norm = base.model.layers[index].get_parameter("audio_input_layernorm.weight")
            weights[name] = norm.detach().float().cpu().clone()
        elif name.endswith("o_proj.weight"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.empty(shape).normal_(0, std, generator=generator)
    return weights
