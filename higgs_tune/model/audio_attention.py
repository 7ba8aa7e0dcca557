"""Cross-attention variants of Higgs Audio V2 as whole models, for inference, export and reference.

`audio_self` is the original code's `use_audio_out_self_attention`: audio rows attend to earlier audio rows
in a separate module before the shared attention. It adds no path from audio to text.
`text_to_audio` is what that flag is often thought to do: text rows attend to earlier audio rows.

Both start as the identity: `o_proj` is 0, and audio_self's extra norm is a copy of
`audio_input_layernorm`.

Source of audio_self: boson_multimodal, HiggsAudioDualFFNDecoderLayer.forward.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cache,
    DynamicCache,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2Model,
    HiggsAudioV2RMSNorm,
    apply_rotary_pos_emb,
)

from higgs_tune.config import CrossAttention
from higgs_tune.errors import ModelError
from higgs_tune.model.new_modules import initial_new_modules, new_module_shapes


class CrossAttentionConfig(HiggsAudioV2Config):
    """The stock config with its own model_type, because the stock classes would drop the new weights."""

    model_type = "higgs_audio_v2_cross_attention"

    cross_attention: str = "audio_self"


class CrossAttentionModule(nn.Module):
    """Grouped-query attention to audio rows, with its own weights and rotary positions."""

    def __init__(self, config: HiggsAudioV2Config, *, zero_key: bool) -> None:
        """With `zero_key`, rows can also attend to nothing: a zero key with a zero value comes first."""
        super().__init__()
        assert config.head_dim is not None
        self.head_dim: int = config.head_dim
        self.zero_key = zero_key
        width, kv_width = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x_BLD: Tensor,
        audio_BL: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: DynamicCache | None = None,
        cache_index: int = 0,
    ) -> Tensor:
        """Attend to the audio rows so far, including those in the cache.

        Without a zero key, the output at rows that are not audio is meaningless.
        """

        def heads(linear: nn.Linear) -> Tensor:
            return linear(x_BLD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k = apply_rotary_pos_emb(heads(self.q_proj), heads(self.k_proj), cos, sin)
        k, v, audio_BS = _with_past(k, heads(self.v_proj), audio_BL, cache, cache_index)
        num_rows, num_columns = q.shape[2], k.shape[2]
        causal_LS = torch.ones(num_rows, num_columns, dtype=torch.bool, device=q.device)
        causal_LS = causal_LS.tril(num_columns - num_rows)
        sees = causal_LS & audio_BS[:, None, None, :]
        if self.zero_key:
            k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
            sees = F.pad(sees, (1, 0), value=True)
        else:  # other rows attend to all earlier rows, only so that no softmax is empty
            sees = torch.where(audio_BL[:, None, :, None], sees, causal_LS)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _with_past(
    k: Tensor, v: Tensor, audio_BL: Tensor, cache: DynamicCache | None, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and audio marks (B, S) of all rows so far.

    The marks are stored as a cache layer after that of the keys, so that the stock cache's operations
    (crop, reorder, move to another device) apply to them too.
    """
    if cache is None:
        return k, v, audio_BL
    while len(cache.layers) <= index + 1:  # a cache made from the config has the stock layers only
        cache.layers.append(DynamicLayer())
    marks_B1L1 = audio_BL[:, None, :, None].to(k.dtype)
    marks, _ = cache.update(marks_B1L1, marks_B1L1, index + 1)
    k, v = cache.update(k, v, index)
    return k, v, marks[:, 0, :, 0] > 0


class CrossAttentionDecoderLayer(HiggsAudioV2DecoderLayer):
    """The stock layer with one of the new modules before the shared attention."""

    def __init__(self, config: CrossAttentionConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.cross_attention = config.cross_attention
        # after the stock layers' entries; two per layer: keys and values, then audio marks
        self.cache_index: int = config.num_hidden_layers + 2 * layer_idx
        if self.cross_attention == "audio_self":
            self.audio_attn = CrossAttentionModule(config, zero_key=False)
            self.audio_post_audio_attn_layer_norm = HiggsAudioV2RMSNorm(
                config.hidden_size, eps=config.rms_norm_eps
            )
        else:
            assert self.cross_attention == "text_to_audio", self.cross_attention
            self.text_audio_attn = CrossAttentionModule(config, zero_key=True)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        audio_token_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the new module, then the stock layer; without `audio_token_mask` every row is audio."""
        assert position_embeddings is not None
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ModelError(
                f"cross_attention {self.cross_attention} does not work with a "
                f"{type(cache).__name__}; generate with the default DynamicCache."
            )
        residual = hidden_states
        audio_BL = audio_token_mask
        if audio_BL is None:
            audio_BL = torch.ones(residual.shape[:2], dtype=torch.bool, device=residual.device)
        audio_BL1 = audio_BL[..., None]
        x = torch.where(
            audio_BL1, self.audio_input_layernorm(residual), self.input_layernorm(residual)
        )
        past = (cache, self.cache_index)
        if self.cross_attention == "audio_self":
            update = self.audio_attn(x, audio_BL, *position_embeddings, *past)
            residual = torch.where(audio_BL1, residual + update, residual)
            x = torch.where(audio_BL1, self.audio_post_audio_attn_layer_norm(residual), x)
        else:
            update = self.text_audio_attn(x, audio_BL, *position_embeddings, *past)
            residual = torch.where(audio_BL1, residual, residual + update)
            x = torch.where(audio_BL1, x, self.input_layernorm(residual))
        attended, _ = self.self_attn(
            hidden_states=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        residual = residual + attended
        return residual + torch.where(
            audio_BL1,
            self.audio_mlp(self.audio_post_attention_layernorm(residual)),
            self.mlp(self.post_attention_layernorm(residual)),
        )


def _check_arguments() -> None:
    """Refuse a transformers whose layer has other arguments, which `**kwargs` would swallow."""
    found, needed = (
        set(inspect.signature(layer.forward).parameters)
        for layer in (HiggsAudioV2DecoderLayer, CrossAttentionDecoderLayer)
    )
    if found != needed:
        raise ModelError(
            f"transformers {transformers.__version__}: HiggsAudioV2DecoderLayer.forward takes "
            f"{sorted(found - needed)} where {sorted(needed - found)} was expected, so cross_attention would "
            "compute something else. Install the transformers version that higgs-tune requires."
        )


class CrossAttentionModel(HiggsAudioV2Model):
    """The stock decoder with `CrossAttentionDecoderLayer`s."""

    config_class = CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig) -> None:
        _check_arguments()
        super().__init__(config)
        self.layers = nn.ModuleList(
            CrossAttentionDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.post_init()


# Keep the ending of this name: transformers derives the loss type from it.
class CrossAttentionHiggsAudioV2ForConditionalGeneration(HiggsAudioV2ForConditionalGeneration):
    """Higgs Audio V2 with `config.cross_attention` "audio_self" or "text_to_audio"."""

    config_class = CrossAttentionConfig

    def __init__(self, config: CrossAttentionConfig, use_text_head: bool = True) -> None:
        super().__init__(config, use_text_head=use_text_head)
        self.model = CrossAttentionModel(config)
        self.post_init()


def cross_attention_config(stock: dict[str, Any], mode: CrossAttention) -> CrossAttentionConfig:
    """A config with the stock one's values and the new modules of `mode`."""
    values = {name: value for name, value in stock.items() if name != "model_type"}
    return CrossAttentionConfig.from_dict(values | {"cross_attention": mode})


def cross_attention_of(config: HiggsAudioV2Config) -> CrossAttention:
    """The cross_attention mode of a model with this config."""
    return getattr(config, "cross_attention", "off")


def with_cross_attention(
    base: HiggsAudioV2ForConditionalGeneration, mode: CrossAttention, seed: int | None
) -> HiggsAudioV2ForConditionalGeneration:
    """A model with the base's weights and new modules.

    Args:
        base: a stock model with its text head; its tensors are shared, not copied.
        mode: "off" returns the base itself.
        seed: for the new modules' random weights, which at first leave every output unchanged; None makes
            all of them 0, to be loaded from a file.

    Raises:
        ModelError: the base already has such modules, or transformers' layer has other arguments.
    """
    if mode == "off":
        return base
    found = cross_attention_of(base.config)
    if found != "off":
        raise ModelError(
            f"the base already has cross_attention modules ({found}), so none can be added. "
            "Use a base without them."
        )
    config = cross_attention_config(base.config.to_dict(), mode)
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = CrossAttentionHiggsAudioV2ForConditionalGeneration(
            config, use_text_head=base.text_lm_head is not None
        )
    # their buffers are in no state dict; a cast to bf16 would round the rotary frequencies
    model.model.rotary_emb = base.model.rotary_emb
    model.model.embed_audio_tokens = base.model.embed_audio_tokens
    model.generation_config = base.generation_config
    own = next(base.parameters())
    if seed is None:
        fresh = {
            name: own.new_zeros(shape) for name, shape in new_module_shapes(base, mode).items()
        }
    else:
        fresh = {n: w.to(own) for n, w in initial_new_modules(base, mode, seed).items()}
    model.load_state_dict(base.state_dict() | fresh, assign=True)
    return model.requires_grad_(False).eval()
