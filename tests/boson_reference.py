"""The original code's forward in plain torch, over its own weight names.

Written from the equations of HiggsAudioModel, HiggsAudioDualFFNDecoderLayer and
HiggsAudioDecoderProjector (boson-ai/higgs-audio) and of Llama 3's rotary scaling; it shares no code
with the package or with transformers. One sequence, no cache.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from higgs_tune.data.tokens import Encoded


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps)


def _frequencies(text: dict[str, Any]) -> Tensor:
    """Rotary frequencies, the low ones slowed down as in Llama 3.1."""
    exponents = torch.arange(0, text["head_dim"], 2).double() / text["head_dim"]
    rope = text["rope_scaling"]
    slowed = []
    for frequency in (1 / text["rope_theta"] ** exponents).tolist():
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        if turns > rope["high_freq_factor"]:
            slowed.append(frequency)
        elif turns < rope["low_freq_factor"]:
            slowed.append(frequency / rope["factor"])
        else:
            share = (turns - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            slowed.append((1 - share) * frequency / rope["factor"] + share * frequency)
    return torch.tensor(slowed)


def _rotate(x_LHE: Tensor, frequencies: Tensor) -> Tensor:
    angles = torch.arange(x_LHE.shape[0])[:, None, None] * frequencies
    a, b = x_LHE.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def _attention(
    weights: dict[str, Tensor], prefix: str, x: Tensor, mask_LL: Tensor, text: dict[str, Any]
) -> Tensor:
    """Llama's attention with an additive mask."""
    frequencies = _frequencies(text)

    def heads(name: str) -> Tensor:
        return (x @ weights[f"{prefix}.{name}.weight"].T).unflatten(-1, (-1, text["head_dim"]))

    q, k, v = (
        _rotate(heads("q_proj"), frequencies),
        _rotate(heads("k_proj"), frequencies),
        heads("v_proj"),
    )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(text["head_dim"]) + mask_LL
    out = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v)
    return out.flatten(1) @ weights[f"{prefix}.o_proj.weight"].T


def _mlp(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate, up, down = (weights[f"{prefix}.{n}_proj.weight"].T for n in ("gate", "up", "down"))
    return (F.silu(x @ gate) * (x @ up)) @ down


def boson_logits(
    weights: dict[str, Tensor], config: dict[str, Any], example: Encoded
) -> tuple[Tensor, Tensor]:
    """Text logits of every row (L, V), audio logits of the audio rows (A, C, codes + 2)."""
    text = config["text_config"]
    eps, lowest = text["rms_norm_eps"], torch.finfo(torch.float32).min
    num_codes = config["audio_codebook_size"] + 2
    audio = torch.zeros(example.num_rows, dtype=torch.bool)
    audio[torch.from_numpy(example.audio_rows_A)] = True
    x = weights["embed_tokens.weight"][torch.from_numpy(example.ids_L)]
    shift = torch.arange(config["audio_num_codebooks"]) * num_codes
    codes = torch.from_numpy(example.codes_AC) + shift
    x[audio] = weights["audio_codebook_embeddings.weight"][codes].sum(1)
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    causal = torch.zeros(len(x), len(x)).masked_fill(later, lowest)
    for n in range(text["num_hidden_layers"]):
        layer = f"layers.{n}"

        def norm(name: str, value: Tensor, layer: str = layer) -> Tensor:
            return _norm(value, weights[f"{layer}.{name}.weight"], eps)

        residual = x
        hidden = torch.where(
            audio[:, None], norm("audio_input_layernorm", x), norm("input_layernorm", x)
        )
        if config["use_audio_out_self_attention"]:
            not_audio = ~audio[:, None] | ~audio[None, :]
            update = _attention(
                weights, f"{layer}.audio_attn", hidden, causal.masked_fill(not_audio, lowest), text
            )
            update = residual + update
            residual = torch.where(audio[:, None], update, residual)
            update = norm("audio_post_audio_attn_layer_norm", update)
            hidden = torch.where(audio[:, None], update, hidden)
        x = residual + _attention(weights, f"{layer}.self_attn", hidden, causal, text)
        before = x.clone()
        x[~audio] += _mlp(weights, f"{layer}.mlp", norm("post_attention_layernorm", before[~audio]))
        x[audio] += _mlp(
            weights, f"{layer}.audio_mlp", norm("audio_post_attention_layernorm", before[audio])
        )
    x = _norm(x, weights["norm.weight"], eps)
    text_logits = x @ weights["audio_decoder_proj.text_lm_head.weight"].T
    audio_logits = x[audio] @ weights["audio_decoder_proj.audio_lm_head.weight"].T
    return text_logits, audio_logits.unflatten(-1, (-1, num_codes))
