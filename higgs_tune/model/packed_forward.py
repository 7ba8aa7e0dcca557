"""Training forward of a pack over the stock modules' frozen weights.

Reads top to bottom as the stock forward does, with three differences: rows stand in slots, so that text
and audio rows need no boolean mask and no host sync; every adapter's rows get that adapter's LoRA; and
the last layer's feed-forward and the heads run at labelled rows only.

Shape letters: as in data.collate; D hidden, H heads, E head size, J adapters of a cross_attention mode.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2RMSNorm,
    HiggsAudioV2RotaryEmbedding,
    apply_rotary_pos_emb,
)

from higgs_tune.config import TargetPath
from higgs_tune.data.collate import CrossIndex, PackBatch
from higgs_tune.model.losses import codebook_nll_sum, text_nll_sum
from higgs_tune.model.packed_lora import PackWeights, adapted_linear

Linears = Mapping[str, nn.Linear]


class _Rearrange(torch.autograd.Function):
    """Copy rows to another layout; backward copies them back by the inverse index.

    Cheaper than autograd's own gather, whose backward is a scatter-add. Rows that only pad the other
    layout get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        to: Tensor,
        back: Tensor,
        real: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(back, real)
        return rows_ND.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        back, real = ctx.saved_tensors
        grad = grads[0].index_select(0, back)
        return grad.masked_fill_(~real[:, None], 0), None, None, None


class _Layout:
    """Slots ↔ sequences of one batch."""

    def __init__(self, batch: PackBatch) -> None:
        self.to_seq = batch.seq_from_slot_RL.flatten()
        self.to_slot = batch.slot_from_seq_KN.flatten()
        every_seq = torch.arange(len(self.to_seq), device=self.to_seq.device)
        every_slot = torch.arange(len(self.to_slot), device=self.to_slot.device)
        self.real_seq = self.to_slot[self.to_seq] == every_seq
        self.real_slot = self.to_seq[self.to_slot] == every_slot
        self.num_seqs, self.length = batch.seq_from_slot_RL.shape

    def sequences(self, x_KNX: Tensor) -> Tensor:
        """(K, N, X) slots → (R, L, X)."""
        rows = _Rearrange.apply(x_KNX.flatten(0, 1), self.to_seq, self.to_slot, self.real_slot)
        return rows.unflatten(0, (self.num_seqs, self.length))

    def slots(self, x_RLX: Tensor, shape: torch.Size) -> Tensor:
        """(R, L, X) sequences → (K, N, X)."""
        rows = _Rearrange.apply(x_RLX.flatten(0, 1), self.to_slot, self.to_seq, self.real_seq)
        return rows.unflatten(0, shape)


def rms_norm(x: Tensor, norm: HiggsAudioV2RMSNorm) -> Tensor:
    """The stock RMSNorm as one kernel."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


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
    """LoRA path → head."""
    assert base.text_lm_head is not None
    return {
        "text_head": {"text_lm_head": base.text_lm_head},
        "audio_head": {"audio_lm_head": base.audio_lm_head},
    }


def _mlp(x: Tensor, groups: list[Linears], weights: PackWeights | None) -> Tensor:
    gate, up = adapted_linear(x, groups[0], weights)
    return adapted_linear(F.silu(gate) * up, groups[1], weights)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int, rope: tuple, **mask) -> Tensor:
    """Attention over (S, L, width) projections; rope is (cos, sin) of the queries and of the keys."""
    q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    (cos_q, sin_q), (cos_k, sin_k) = rope
    q, _ = apply_rotary_pos_emb(q, q[:, :0], cos_q, sin_q)
    k, _ = apply_rotary_pos_emb(k, k[:, :0], cos_k, sin_k)
    if "attn_mask" in mask:  # text_to_audio: a zero key and value in front, so no softmax is empty
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)
    return out.transpose(1, 2).flatten(2)


class _Rope:
    """Rotary tables of every position of the batch."""

    def __init__(self, rotary: HiggsAudioV2RotaryEmbedding, length: int, like: Tensor) -> None:
        positions = torch.arange(length, device=like.device)[None]
        self.cos_1LE, self.sin_1LE = rotary(like, positions)

    def whole(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        table = (self.cos_1LE, self.sin_1LE)
        return table, table

    def at(self, position_SL: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos_1LE[0][position_SL], self.sin_1LE[0][position_SL]


def _cross_weight(name: str, cross: CrossIndex, weights: PackWeights) -> Tensor:
    return weights.leaves[name].index_select(0, cross.adapters_J)


def _audio_self(
    prefix: str,
    h_JAD: Tensor,
    x_JAD: Tensor,
    cross: CrossIndex,
    weights: PackWeights,
    rope: _Rope,
    head_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Audio rows read earlier audio rows; returns the new residual and what attention reads."""
    name = f"{prefix}.audio_attn"
    from_slot, back = cross.audio_from_slot_SA, cross.audio_slot_from_seq_JA
    q, k, v = (
        torch.bmm(
            x_JAD, _cross_weight(f"{name}.{p}_proj.weight", cross, weights).transpose(1, 2)
        ).flatten(0, 1)[from_slot]
        for p in "qkv"
    )
    position = rope.at(cross.audio_position_SA)
    out = _attend(q, k, v, head_dim, (position, position), is_causal=True)
    o_JDO = _cross_weight(f"{name}.o_proj.weight", cross, weights).transpose(1, 2)
    h_JAD = h_JAD + torch.bmm(out.flatten(0, 1)[back], o_JDO)
    gain_JD = _cross_weight(f"{prefix}.audio_post_audio_attn_layer_norm.weight", cross, weights)
    return h_JAD, F.rms_norm(h_JAD, h_JAD.shape[-1:], eps=eps) * gain_JD[:, None]


def _text_to_audio(
    prefix: str,
    h_JTD: Tensor,
    x_JTD: Tensor,
    x_JAD: Tensor,
    cross: CrossIndex,
    weights: PackWeights,
    rope: _Rope,
    head_dim: int,
) -> Tensor:
    """Text rows read earlier audio rows; returns the new residual."""
    name = f"{prefix}.text_audio_attn"

    def project(x: Tensor, p: str, from_slot: Tensor) -> Tensor:
        weight = _cross_weight(f"{name}.{p}_proj.weight", cross, weights)
        return torch.bmm(x, weight.transpose(1, 2)).flatten(0, 1)[from_slot]

    q = project(x_JTD, "q", cross.text_from_slot_ST)
    k, v = (project(x_JAD, p, cross.audio_from_slot_SA) for p in "kv")
    positions = (rope.at(cross.text_position_ST), rope.at(cross.audio_position_SA))
    out = _attend(q, k, v, head_dim, positions, attn_mask=cross.sees_audio_ST1A[:, None])
    o_JDO = _cross_weight(f"{name}.o_proj.weight", cross, weights).transpose(1, 2)
    return h_JTD + torch.bmm(out.flatten(0, 1)[cross.text_slot_from_seq_JT], o_JDO)


def packed_nll(
    base: HiggsAudioV2ForConditionalGeneration, batch: PackBatch, weights: PackWeights | None
) -> tuple[Tensor, Tensor]:
    """Summed nats of every adapter's targets: float32, text (K,), audio (K, C).

    Arguments as for `packed_logits`.
    """
    text_logits, audio_logits = packed_logits(base, batch, weights)
    return (
        text_nll_sum(text_logits, batch.text_labels_KM),
        codebook_nll_sum(audio_logits, batch.audio_labels_KMC),
    )


def packed_logits(
    base: HiggsAudioV2ForConditionalGeneration, batch: PackBatch, weights: PackWeights | None
) -> tuple[Tensor, Tensor]:
    """Logits at every adapter's labelled rows.

    Args:
        base: the stock model with its text head.
        batch: from `data.collate.collate`, labels already shifted.
        weights: the adapters at `batch.slots`; None runs the bare base for each.

    Returns:
        Text (K, M, V) and audio (K, M, C, V), each with its own M, in the base's dtype.
    """
    model, config = base.model, base.config
    head_dim = config.head_dim
    assert head_dim is not None
    num_text = batch.text_ids_KT.shape[1]
    codes = batch.audio_codes_KAC + model.embed_audio_tokens.audio_tokens_offsets
    h_KTD = F.embedding(batch.text_ids_KT, model.embed_tokens.weight)
    h_KAD = F.embedding(codes, model.embed_audio_tokens.embed_audio_tokens.weight).sum(2)
    h_KND = torch.cat([h_KTD, h_KAD], dim=1)
    layout = _Layout(batch)
    rope = _Rope(model.rotary_emb, layout.length, h_KND)
    cross = batch.cross if weights is not None and h_KAD.shape[1] else {}
    text_rows_KM, audio_rows_KM = batch.text_rows_KM[..., None], batch.audio_rows_KM[..., None]

    num_layers = len(model.layers)
    for index, layer in enumerate(decoder_layers(base)):
        groups = layer_groups(index, layer)
        x_text = rms_norm(h_KND[:, :num_text], layer.input_layernorm)
        x_audio = rms_norm(h_KND[:, num_text:], layer.audio_input_layernorm)
        if cross and weights is not None:
            h_KND, x_text, x_audio = _cross_attention(
                index, layer, h_KND, x_text, x_audio, cross, weights, rope, head_dim
            )
        x_KND = torch.cat([x_text, x_audio], dim=1)
        q, k, v = adapted_linear(x_KND, groups["attention"][0], weights)
        qkv = layout.sequences(torch.cat([q, k, v], dim=2)).split(
            [t.shape[2] for t in (q, k, v)], dim=2
        )
        attended = _attend(*qkv, head_dim, rope.whole(), is_causal=True)
        attended = layout.slots(attended, batch.slot_from_seq_KN.shape)
        if index == num_layers - 1:  # nothing reads the other rows any more
            h_KND, attended = (
                torch.cat(
                    [
                        t[:, :num_text].gather(1, text_rows_KM.expand(-1, -1, t.shape[2])),
                        t[:, num_text:].gather(1, audio_rows_KM.expand(-1, -1, t.shape[2])),
                    ],
                    dim=1,
                )
                for t in (h_KND, attended)
            )
            num_text = text_rows_KM.shape[1]
        h_KND = h_KND + adapted_linear(attended, groups["attention"][1], weights)[0]
        h_text, h_audio = h_KND[:, :num_text], h_KND[:, num_text:]
        x_text = rms_norm(h_text, layer.post_attention_layernorm)
        x_audio = rms_norm(h_audio, layer.audio_post_attention_layernorm)
        h_KND = torch.cat(
            [
                h_text + _mlp(x_text, groups["text_mlp"], weights),
                h_audio + _mlp(x_audio, groups["audio_mlp"], weights),
            ],
            dim=1,
        )

    h_KND = rms_norm(h_KND, model.norm)
    heads = head_groups(base)
    text_logits = adapted_linear(h_KND[:, :num_text], heads["text_head"], weights)[0]
    audio_logits = adapted_linear(h_KND[:, num_text:], heads["audio_head"], weights)[0]
    codebooks = (config.num_codebooks, config.codebook_size)
    return text_logits, audio_logits.unflatten(-1, codebooks)


def _cross_attention(
    index: int,
    layer: HiggsAudioV2DecoderLayer,
    h_KND: Tensor,
    x_text: Tensor,
    x_audio: Tensor,
    cross: Mapping[str, CrossIndex],
    weights: PackWeights,
    rope: _Rope,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the new modules of the adapters that have some; the others' rows pass unchanged."""
    prefix, num_text = f"model.layers.{index}", x_text.shape[1]
    h_text, h_audio = h_KND[:, :num_text], h_KND[:, num_text:]
    for mode, where in cross.items():
        rows = where.adapters_J
        if mode == "audio_self":
            h, x = _audio_self(
                prefix,
                h_audio[rows],
                x_audio[rows],
                where,
                weights,
                rope,
                head_dim,
                layer.audio_input_layernorm.variance_epsilon,
            )
            h_audio, x_audio = h_audio.index_copy(0, rows, h), x_audio.index_copy(0, rows, x)
        else:
            h = _text_to_audio(
                prefix, h_text[rows], x_text[rows], x_audio[rows], where, weights, rope, head_dim
            )
            h_text = h_text.index_copy(0, rows, h)
            x_text = x_text.index_copy(0, rows, rms_norm(h, layer.input_layernorm))
    return torch.cat([h_text, h_audio], dim=1), x_text, x_audio
