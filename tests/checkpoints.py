"""Small checkpoints in exactly the formats that people have on disk.

The original's names and config are written out here from the index and config.json of the checkpoint as
first released, not taken from `higgs_tune.model.boson`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerFast

from higgs_tune.data.tokens import CONTROL_TOKENS
from tests.models import LETTERS, NUM_CODEBOOKS, NUM_CODES, vocabulary

SHARD_BYTES = 30_000  # splits a model of 150 kB into several shards
# Renders turns of texts or clips as the native template does.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text | trim }}"
    "{% else %}<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>{% endif %}{% endfor %}"
    "<|eot_id|>{% endfor %}"
)
# The original's weights: (original name, native name) outside layers, and names within a layer, which agree.
_OUTSIDE = [
    ("embed_tokens.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("audio_codebook_embeddings.weight", "model.embed_audio_tokens.embed_audio_tokens.weight"),
    ("audio_decoder_proj.audio_lm_head.weight", "audio_lm_head.weight"),
    ("audio_decoder_proj.text_lm_head.weight", "text_lm_head.weight"),
]
_IN_LAYER = [
    "audio_input_layernorm.weight", "audio_mlp.down_proj.weight", "audio_mlp.gate_proj.weight",
    "audio_mlp.up_proj.weight", "audio_post_attention_layernorm.weight", "input_layernorm.weight",
    "mlp.down_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
    "post_attention_layernorm.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight",
    "self_attn.q_proj.weight", "self_attn.v_proj.weight",
]  # fmt: skip
_AUDIO_SELF = [
    "audio_attn.k_proj.weight", "audio_attn.o_proj.weight", "audio_attn.q_proj.weight",
    "audio_attn.v_proj.weight", "audio_post_audio_attn_layer_norm.weight",
]  # fmt: skip


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """The ids of `models.vocabulary`, as a tokenizer."""
    ids = vocabulary()
    words = {"<|pad|>": 0} | {token: getattr(ids, name) for name, token in CONTROL_TOKENS.items()}
    pieces = ["system", "user", "assistant", "\n\n", *LETTERS]
    words |= {piece: 9 + n for n, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<|pad|>"))
    split = Regex(r"\A(?:system|user|assistant)\z|\n\n|[\s\S]")
    inner.pre_tokenizer = pre_tokenizers.Split(split, behavior="isolated")
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=CONTROL_TOKENS["begin_of_text"],
        eos_token=CONTROL_TOKENS["end_of_turn"],
        pad_token="<|pad|>",
        unk_token="<|pad|>",
        additional_special_tokens=list(CONTROL_TOKENS.values()),
        clean_up_tokenization_spaces=False,
    )
    found.chat_template = template
    return found


def write_native(folder: Path, model: HiggsAudioV2ForConditionalGeneration) -> Path:
    """The native format, sharded, with tokenizer and chat template."""
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def boson_names(num_layers: int, *, audio_self: bool) -> dict[str, str]:
    """Original name → native name."""
    in_layer = _IN_LAYER + (_AUDIO_SELF if audio_self else [])
    layers = {
        f"layers.{n}.{name}": f"model.layers.{n}.{name}"
        for n in range(num_layers)
        for name in in_layer
    }
    return dict(_OUTSIDE) | layers


def boson_config(num_layers: int, *, audio_self: bool) -> dict[str, Any]:
    """config.json as released, with the tiny model's sizes, ids and rotary base."""
    ids = vocabulary()
    return {
        "architectures": ["HiggsAudioModel"],
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_bos_token": "<|audio_bos|>",
        "audio_codebook_size": NUM_CODES,
        "audio_decoder_proj_num_layers": 0,
        "audio_dual_ffn_layers": list(range(num_layers)),
        "audio_embed_avg": False,
        "audio_eos_token": "<|audio_eos|>",
        "audio_eos_token_id": ids.audio_eos,
        "audio_ffn_hidden_size": 32,
        "audio_ffn_intermediate_size": 48,
        "audio_in_token": "<|AUDIO|>",
        "audio_in_token_idx": 128015,
        "audio_num_codebooks": NUM_CODEBOOKS,
        "audio_out_bos_token": "<|audio_out_bos|>",
        "audio_out_bos_token_id": ids.audio_bos,
        "audio_out_token": "<|AUDIO_OUT|>",
        "audio_out_token_idx": ids.audio,
        "audio_stream_bos_id": NUM_CODES,
        "audio_stream_eos_id": NUM_CODES + 1,
        "audio_tokenizer_config": None,
        "encode_audio_in_tokens": True,
        "encode_whisper_embed": False,
        "hidden_size": 32,
        "model_type": "higgs_audio",
        "pad_token_id": 0,
        "rq_transformer_num_hidden_layers": 3,
        "skip_audio_tower": True,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids.begin_of_text,
            "eos_token_id": ids.end_of_turn,
            "head_dim": 8,
            "hidden_act": "silu",
            "hidden_size": 32,
            "initializer_range": 0.1,
            "intermediate_size": 48,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": num_layers,
            "num_key_value_heads": 2,
            "pad_token_id": None,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 16,  # short, so that the scaling has an effect
                "rope_type": "llama3",
            },
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": 13 + len(LETTERS),
        },
        "torch_dtype": "float32",
        "transformers_version": "4.46.3",
        "use_audio_out_embed_projector": False,
        "use_audio_out_self_attention": audio_self or 0,
        "use_delay_pattern": True,
        "use_rq_transformer": False,
    }  # fmt: skip


def write_boson(folder: Path, num_layers: int = 2, *, audio_self: bool) -> dict[str, torch.Tensor]:
    """The original format with random weights, sharded; returns the weights by their original names."""
    rows = NUM_CODEBOOKS * (NUM_CODES + 2)
    vocab = 13 + len(LETTERS)
    shapes = {
        "embed_tokens": (vocab, 32), "norm": (32,), "audio_codebook_embeddings": (rows, 32),
        "audio_lm_head": (rows, 32), "text_lm_head": (vocab, 32),
        "q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
        "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name in boson_names(num_layers, audio_self=audio_self):
        shape = shapes.get(name.split(".")[-2], (32,))
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.2 * noise if len(shape) == 1 else 0.2 * noise
    folder.mkdir()
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES)
    config = boson_config(num_layers, audio_self=audio_self)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer(template=None).save_pretrained(folder)  # as released: no template
    assert (folder / "model.safetensors.index.json").is_file()
    return weights
