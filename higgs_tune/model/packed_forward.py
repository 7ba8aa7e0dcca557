"""Training forward of a pack over the stock modules' frozen weights.

Has the structure of the stock forward, with three differences: rows are laid out in slots, so that telling
text from audio needs no boolean mask and no host sync; every adapter's rows get that adapter's LoRA; and
after the last attention only labelled rows are computed.

Shape letters: as in data.collate; D hidden, H heads, E head size, J adapters of a cross_attention mode.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2RotaryEmbedding,
)

from higgs_tune.data.collate import CrossIndex, PackBatch
from higgs_tune.model.adapter_layout import Linears
from higgs_tune.model.dropout import Section
from higgs_tune.model.graph_weights import Adapters
from higgs_tune.model.groups import decoder_layers, head_groups, layer_groups
from higgs_tune.model.losses import nll_sum
from higgs_tune.model.new_module_ops import new_linear, new_scale
from higgs_tune.model.packed_ops import (
    adapted_linear,
    rearrange,
    rms_norm,
    rotate,
    swiglu,
)


class _Layout:
    """Converts slots ↔ sequences, for the whole batch or for one modality of some adapters."""

    def __init__(self, seq_from_slot_SL: Tensor, slot_from_seq_KN: Tensor) -> None:
        self._to_seq = seq_from_slot_SL.flatten()
        self._to_slot = slot_from_seq_KN.flatten()
        every_seq = torch.arange(len(self._to_seq), device=self._to_seq.device)
        every_slot = torch.arange(len(self._to_slot), device=self._to_slot.device)
        self._pads_seq = self._to_slot[self._to_seq] != every_seq
        self._pads_slot = self._to_seq[self._to_slot] != every_slot
        self._seq_shape, self._slot_shape = seq_from_slot_SL.shape, slot_from_seq_KN.shape

    def sequences(self, x_KNX: Tensor) -> Tensor:
        """(K, N, X) slots → (S, L, X)."""
        rows = rearrange(x_KNX.flatten(0, 1), self._to_seq, self._to_slot, self._pads_slot)
        return rows.unflatten(0, self._seq_shape)

    def slots(self, x_SLX: Tensor) -> Tensor:
        """(S, L, X) sequences → (K, N, X)."""
        rows = rearrange(x_SLX.flatten(0, 1), self._to_slot, self._to_seq, self._pads_seq)
        return rows.unflatten(0, self._slot_shape)


def _mlp(
    x_KND: Tensor, groups: list[Linears], weights: Adapters | None, section: Section
) -> Tensor:
    inner = swiglu(adapted_linear(x_KND, groups[0], weights, (section,)))
    return adapted_linear(inner, groups[1], weights, (section,))


def _attend(q_SLHE: Tensor, k_SLHE: Tensor, v_SLX: Tensor, **mask: Any) -> Tensor:
    """Attention over queries and keys that are rotated already: (S, L, H·E)."""
    v_SLHE = v_SLX.unflatten(-1, (-1, k_SLHE.shape[-1]))
    q, k, v = (t.transpose(1, 2) for t in (q_SLHE, k_SLHE, v_SLHE))
    if "attn_mask" in mask:  # text_to_audio: a zero key and value in front, so no softmax is empty
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)
    return out.transpose(1, 2).flatten(2)


class _Rope:
    """Rotary tables for every position of the batch."""

    def __init__(self, rotary: HiggsAudioV2RotaryEmbedding, length: int, like: Tensor) -> None:
        positions = torch.arange(length, device=like.device)[None]
        self._cos_1LE, self._sin_1LE = rotary(like, positions)

    def __call__(self, x_SLX: Tensor, position_SL: Tensor | None = None) -> Tensor:
        """Split heads and rotate: (S, L, X) → (S, L, H, E); positions default to 0, 1, …"""
        cos, sin = self._cos_1LE, self._sin_1LE
        if position_SL is not None:
            cos, sin = cos[0][position_SL], sin[0][position_SL]
        return rotate(x_SLX.unflatten(-1, (-1, cos.shape[-1])), cos, sin)


class _Cross:
    """The new modules of the adapters of one cross_attention mode in one batch."""

    def __init__(
        self, index: CrossIndex, weights: Adapters, rope: _Rope, widths: list[int]
    ) -> None:
        self._index, self._weights, self._rope, self._widths = index, weights, rope, widths
        self._audio = _Layout(index.audio_from_slot_SA, index.audio_slot_from_seq_JA)
        self._text = _Layout(index.text_from_slot_ST, index.text_slot_from_seq_JT)

    def take(self, x_KND: Tensor) -> Tensor:
        """The rows of these adapters: (J, N, D)."""
        if torch.compiler.is_compiling():
            every = x_KND.unbind()
            return torch.stack([every[k] for k in self._index.adapters])
        return x_KND.index_select(0, self._index.adapters_J)

    def put(self, x_KND: Tensor, own_JND: Tensor) -> Tensor:
        """All adapters' rows with these adapters' replaced."""
        if torch.compiler.is_compiling():  # Inductor fails on some fusions of a scatter
            every = list(x_KND.unbind())
            for k, own in zip(self._index.adapters, own_JND.unbind(), strict=True):
                every[k] = own
            return torch.stack(every)
        return x_KND.index_copy(0, self._index.adapters_J, own_JND)

    def _project(self, x_JND: Tensor, name: str, projections: str) -> Tensor:
        names = tuple(f"{name}.{p}_proj.weight" for p in projections)
        return new_linear(x_JND, self._weights, names, self._index.adapters)

    def audio_self(
        self, prefix: str, h_JAD: Tensor, x_JAD: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Let audio rows attend to earlier audio rows.

        Returns:
            The new residual, and the input of the shared attention.
        """
        name = f"{prefix}.audio_attn"
        qkv = self._audio.sequences(self._project(x_JAD, name, "qkv"))
        q, k, v = qkv.split(self._widths, 2)
        position_SA = self._index.audio_position_SA
        out = _attend(self._rope(q, position_SA), self._rope(k, position_SA), v, is_causal=True)
        h_JAD = h_JAD + self._project(self._audio.slots(out), name, "o")
        gain = f"{prefix}.audio_post_audio_attn_layer_norm.weight"
        plain_JAD = rms_norm(h_JAD, h_JAD.new_ones(h_JAD.shape[2]), eps)
        return h_JAD, new_scale(plain_JAD, self._weights, gain, self._index.adapters)

    def text_to_audio(self, prefix: str, h_JTD: Tensor, x_JTD: Tensor, x_JAD: Tensor) -> Tensor:
        """Let text rows attend to earlier audio rows; returns the new residual."""
        name, index = f"{prefix}.text_audio_attn", self._index
        q = self._text.sequences(self._project(x_JTD, name, "q"))
        k, v = self._audio.sequences(self._project(x_JAD, name, "kv")).split(self._widths[1:], 2)
        out = _attend(
            self._rope(q, index.text_position_ST),
            self._rope(k, index.audio_position_SA),
            v,
            attn_mask=index.sees_audio_ST1A[:, None],
        )
        return h_JTD + self._project(self._text.slots(out), name, "o")


def packed_nll(
    base: HiggsAudioV2ForConditionalGeneration, batch: PackBatch, weights: Adapters | None
) -> tuple[Tensor, Tensor]:
    """Summed NLL in nats of every adapter's targets: float32, text (K,), audio (K, C).

    Arguments as for `packed_logits`.
    """
    text_logits, audio_logits = packed_logits(base, batch, weights)
    return (
        nll_sum(text_logits, batch.text_labels_KM),
        nll_sum(audio_logits, batch.audio_labels_KMC),
    )


def packed_logits(
    base: HiggsAudioV2ForConditionalGeneration, batch: PackBatch, weights: Adapters | None
) -> tuple[Tensor, Tensor]:
    """Logits at every adapter's labelled rows.

    Args:
        base: the stock model with its text head.
        batch: from `data.collate.collate`, labels already shifted.
        weights: the adapters at `batch.slots`; None runs the base without adapters.

    Returns:
        Text (K, M, V) and audio (K, M, C, V), each with its own M, in the base's dtype.
    """
    model, config = base.model, base.config
    codes = batch.audio_codes_KAC + model.embed_audio_tokens.audio_tokens_offsets
    h_text = F.embedding(batch.text_ids_KT, model.embed_tokens.weight)
    h_audio = F.embedding(codes, model.embed_audio_tokens.embed_audio_tokens.weight).sum(2)
    layout = _Layout(batch.seq_from_slot_RL, batch.slot_from_seq_KN)
    rope = _Rope(model.rotary_emb, batch.seq_from_slot_RL.shape[1], h_text)
    head_dim, eps = config.head_dim, config.rms_norm_eps
    assert head_dim is not None
    num_heads, num_kv = config.num_attention_heads, config.num_key_value_heads
    widths = [n * head_dim for n in (num_heads, num_kv, num_kv)]
    crosses = {}
    if weights is not None and h_audio.shape[1]:
        crosses = {m: _Cross(index, weights, rope, widths) for m, index in batch.cross.items()}

    text = Section(h_text.shape[1], batch.num_text_K)
    audio = Section(h_audio.shape[1], batch.num_audio_K)
    layers = decoder_layers(base)
    for index, layer in enumerate(layers):
        groups = layer_groups(index, layer)
        x_text = rms_norm(h_text, layer.input_layernorm.weight, eps)
        x_audio = rms_norm(h_audio, layer.audio_input_layernorm.weight, eps)
        for mode, cross in crosses.items():
            h_text, h_audio, x_text, x_audio = _cross_attention(
                mode, cross, f"model.layers.{index}", layer, h_text, h_audio, x_text, x_audio
            )
        x_KND = torch.cat([x_text, x_audio], dim=1)
        qkv = layout.sequences(
            adapted_linear(x_KND, groups["attention"][0], weights, (text, audio))
        )
        qk, v = qkv.split([widths[0] + widths[1], widths[2]], dim=2)
        q, k = rope(qk).split([num_heads, num_kv], dim=2)
        attended = layout.slots(_attend(q, k, v, is_causal=True))
        a_text, a_audio = attended.split([h_text.shape[1], h_audio.shape[1]], dim=1)
        if index == len(layers) - 1:  # nothing reads the unlabelled rows any more
            h_text, a_text = (_pick(t, batch.text_rows_KM) for t in (h_text, a_text))
            h_audio, a_audio = (_pick(t, batch.audio_rows_KM) for t in (h_audio, a_audio))
            attended = torch.cat([a_text, a_audio], dim=1)
            text = Section(h_text.shape[1], batch.num_text_labelled_K)
            audio = Section(h_audio.shape[1], batch.num_audio_labelled_K)
        update = adapted_linear(attended, groups["attention"][1], weights, (text, audio))
        u_text, u_audio = update.split([h_text.shape[1], h_audio.shape[1]], dim=1)
        h_text, h_audio = h_text + u_text, h_audio + u_audio
        x_text = rms_norm(h_text, layer.post_attention_layernorm.weight, eps)
        x_audio = rms_norm(h_audio, layer.audio_post_attention_layernorm.weight, eps)
        h_text = h_text + _mlp(x_text, groups["text_mlp"], weights, text)
        h_audio = h_audio + _mlp(x_audio, groups["audio_mlp"], weights, audio)

    h_text, h_audio = (rms_norm(h, model.norm.weight, eps) for h in (h_text, h_audio))
    heads = head_groups(base)
    text_logits = adapted_linear(h_text, heads["text_head"], weights, (text,))
    audio_logits = adapted_linear(h_audio, heads["audio_head"], weights, (audio,))
    codebooks = (config.num_codebooks, config.codebook_size)
    return text_logits, audio_logits.unflatten(-1, codebooks)


def _pick(x_KND: Tensor, rows_KM: Tensor) -> Tensor:
    """Each adapter's rows at `rows_KM`: (K, M, D)."""
    return x_KND.gather(1, rows_KM[..., None].expand(-1, -1, x_KND.shape[2]))


def _cross_attention(
    mode: str,
    cross: _Cross,
    prefix: str,
    layer: HiggsAudioV2DecoderLayer,
    h_text: Tensor,
    h_audio: Tensor,
    x_text: Tensor,
    x_audio: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the new modules of the adapters that have them; the others' rows pass unchanged."""
    read = cross.take(x_audio)
    if mode == "audio_self":
        eps = layer.audio_input_layernorm.variance_epsilon
        h, x = cross.audio_self(prefix, cross.take(h_audio), read, eps)
        h_audio, x_audio = cross.put(h_audio, h), cross.put(x_audio, x)
    else:
        h = cross.text_to_audio(prefix, cross.take(h_text), cross.take(x_text), read)
        norm = layer.input_layernorm
        x = rms_norm(h, norm.weight, norm.variance_epsilon)
        h_text, x_text = cross.put(h_text, h), cross.put(x_text, x)
    return h_text, h_audio, x_text, x_audio
