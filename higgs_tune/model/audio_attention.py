"""Cross-attention variants of Higgs Audio V2 as whole models, for inference, export and reference.

`audio_self` is the original code's `use_audio_out_self_attention`: audio rows read earlier audio rows
through a module of their own, before the shared attention. It opens no way from audio to text.
`text_to_audio` is what that flag is often thought to do: text rows read earlier audio rows.

Both start as the identity: `o_proj` is 0, and audio_self's extra norm is a copy of
`audio_input_layernorm`. Stock checkpoints load with only the new keys missing.

Source of audio_self: boson_multimodal, HiggsAudioDualFFNDecoderLayer.forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2Model,
    HiggsAudioV2RMSNorm,
    apply_rotary_pos_emb,
)

from higgs_tune.config import CrossAttention
from higgs_tune.errors import ModelError

MODULE_NAMES: dict[str, tuple[str, ...]] = {
    "off": (),
    "audio_self": ("audio_attn", "audio_post_audio_attn_layer_norm"),
    "text_to_audio": ("text_audio_attn",),
}
"""New modules of each decoder layer, as attribute names."""


class CrossAttentionModule(nn.Module):
    """Grouped-query attention with weights of its own, and rotary positions of the whole sequence."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim: int = config.head_dim
        width, kv_width = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor, sees_B1LL: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend where `sees` is true, or to nothing: a zero key with a zero value is always there."""

        def heads(linear: nn.Linear) -> Tensor:
            return linear(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k = apply_rotary_pos_emb(heads(self.q_proj), heads(self.k_proj), cos, sin)
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(heads(self.v_proj), (0, 0, 1, 0))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=F.pad(sees_B1LL, (1, 0), value=True), enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class AudioSelfAttentionModule(CrossAttentionModule):
    """The original's `audio_attn`: as above without the zero key, since a row always sees itself."""

    def forward(self, x_BLD: Tensor, sees_B1LL: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend where `sees` is true; a row that sees nothing returns a value nobody may use."""

        def heads(linear: nn.Linear) -> Tensor:
            return linear(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k = apply_rotary_pos_emb(heads(self.q_proj), heads(self.k_proj), cos, sin)
        out = F.scaled_dot_product_attention(
            q, k, heads(self.v_proj), attn_mask=sees_B1LL, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class CrossAttentionDecoderLayer(HiggsAudioV2DecoderLayer):
    """The stock layer with one of the new modules in front of the shared attention."""

    def __init__(self, config: HiggsAudioV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.cross_attention: str = config.cross_attention
        if self.cross_attention == "audio_self":
            self.audio_attn = AudioSelfAttentionModule(config)
            self.audio_post_audio_attn_layer_norm = HiggsAudioV2RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )
        elif self.cross_attention == "text_to_audio":
            self.text_audio_attn = CrossAttentionModule(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        audio_token_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if audio_token_mask is None or past_key_values is not None or position_embeddings is None:
            raise ModelError(
                f"cross_attention {self.cross_attention} runs on whole sequences only; "
                "call the model with use_cache=False and input_ids."
            )
        audio_BL1 = audio_token_mask[..., None]
        residual = hidden_states
        x = torch.where(
            audio_BL1, self.audio_input_layernorm(residual), self.input_layernorm(residual)
        )
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        sees = causal & audio_token_mask[:, None, None, :]
        if self.cross_attention == "audio_self":
            # rows that are not audio see the causal past, only so that no softmax is empty
            sees = torch.where(audio_token_mask[:, None, :, None], sees, causal)
            update = self.audio_attn(x, sees, *position_embeddings)
            residual = torch.where(audio_BL1, residual + update, residual)
            x = torch.where(audio_BL1, self.audio_post_audio_attn_layer_norm(residual), x)
        else:
            update = self.text_audio_attn(x, sees, *position_embeddings)
            residual = torch.where(audio_BL1, residual, residual + update)
            x = torch.where(audio_BL1, x, self.input_layernorm(residual))
        attended, _ = self.self_attn(
            hidden_states=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        residual = residual + attended
        return residual + torch.where(
            audio_BL1,
            self.audio_mlp(self.audio_post_attention_layernorm(residual)),
            self.mlp(self.post_attention_layernorm(residual)),
        )


class CrossAttentionModel(HiggsAudioV2Model):
    """The stock decoder with `CrossAttentionDecoderLayer`s."""

    def __init__(self, config: HiggsAudioV2Config) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            CrossAttentionDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


# The name's ending stays: transformers derives the loss type from it.
class CrossAttentionHiggsAudioV2ForConditionalGeneration(HiggsAudioV2ForConditionalGeneration):
    """Higgs Audio V2 with `config.cross_attention` "audio_self" or "text_to_audio"."""

    def __init__(self, config: HiggsAudioV2Config, use_text_head: bool = True) -> None:
        super().__init__(config, use_text_head=use_text_head)
        self.model = CrossAttentionModel(config)
        self.post_init()


def with_cross_attention(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention, seed: int
) -> HiggsAudioV2ForConditionalGeneration:
    """A model with the base's weights and the new modules, which leaves every output unchanged.

    Args:
        base: a stock model with its text head; its tensors are shared, not copied.
        mode: "off" returns the base itself.
        seed: of the new modules' random weights.
    """
    if mode == "off":
        return base
    config = type(base.config).from_dict(base.config.to_dict())
    config.cross_attention = mode
    config._attn_implementation = base.config._attn_implementation
    reference = next(base.parameters())
    model = CrossAttentionHiggsAudioV2ForConditionalGeneration(
        config, use_text_head=base.text_lm_head is not None
    )
    model.to(device=reference.device, dtype=reference.dtype)  # type: ignore[call-arg]
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False, assign=True)
    assert not unexpected, unexpected
    fresh = initial_new_modules(base, mode, seed)
    assert set(missing) == set(fresh), set(missing) ^ set(fresh)
    model.load_state_dict(fresh, strict=False)
    return model.eval()


def initial_new_modules(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention, seed: int
) -> dict[str, Tensor]:
    """Full names → initial weights of the new modules, float32 on the CPU.

    q, k and v are normal with the checkpoint's initializer_range, o is 0, the norm copies
    `audio_input_layernorm`: setting o to 0 alone would change the output.
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


def new_module_shapes(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention
) -> dict[str, torch.Size]:
    """Full names → shapes of the new modules' weights, in the order in which they are drawn."""
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
