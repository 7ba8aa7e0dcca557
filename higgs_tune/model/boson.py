"""The original `boson_multimodal` format: convert its config and weight names to and from the native ones.

Sources: configuration_higgs_audio.py, modeling_higgs_audio.py and audio_head.py of boson-ai/higgs-audio;
config.json and model.safetensors.index.json of the checkpoint as first released; and transformers'
convert_higgs_audio_v2_to_hf.py, whose name mapping is used here. The original has no token for delay rows.
Native sequences mark them with `<|reserved_special_token_6|>`, whose embedding is never read, so both
compute the same.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, HiggsAudioV2Config, LlamaConfig

from higgs_tune.config import CrossAttention
from higgs_tune.data.tokens import CONTROL_TOKENS
from higgs_tune.errors import ModelError
from higgs_tune.model.audio_attention import cross_attention_config

MODEL_TYPE = "higgs_audio"
NATIVE_NAMES = {
    r"^audio_codebook_embeddings\.": "model.embed_audio_tokens.embed_audio_tokens.",
    r"^(embed_tokens|layers|norm)\.": r"model.\1.",
    r"^audio_decoder_proj\.": "",
}
"""Pattern → replacement, in the form of `from_pretrained`'s `key_mapping`."""

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "attention_bias", "attention_dropout", "mlp_bias",
)  # fmt: skip
# Options of the original code that the native model supports only as the released checkpoint sets them.
_OFF = (
    "audio_embed_avg",
    "use_audio_out_embed_projector",
    "use_rq_transformer",
    "audio_decoder_proj_num_layers",
)
_ON = ("use_delay_pattern", "skip_audio_tower")


def native_name(name: str) -> str:
    """The native name of an original weight."""
    for pattern, replacement in NATIVE_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def boson_name(name: str) -> str:
    """The original name of a native weight."""
    if name.endswith("lm_head.weight"):
        return f"audio_decoder_proj.{name}"
    embedding = "model.embed_audio_tokens.embed_audio_tokens."
    if name.startswith(embedding):
        return f"audio_codebook_embeddings.{name.removeprefix(embedding)}"
    return name.removeprefix("model.")


def native_config(raw: Mapping[str, Any], ids: Mapping[str, int], where: str) -> HiggsAudioV2Config:
    """Convert an original config to a native one.

    Args:
        raw: the original config.json.
        ids: token → id of its tokenizer, including the control tokens.
        where: prefix of error messages.

    Raises:
        ModelError: a value is missing or not of such a model, the native model does not support an option,
            or ids differ from the tokenizer's.
    """
    text = raw.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", "llama") != "llama":
        raise ModelError(f"{where}: text_config is not that of a Llama model.")
    llama = LlamaConfig(**text)
    _check_options(raw, llama.num_hidden_layers, where)
    for field, token in (
        ("audio_out_token_idx", "audio"),
        ("audio_out_bos_token_id", "audio_bos"),
        ("audio_eos_token_id", "audio_eos"),
    ):
        found = ids[CONTROL_TOKENS[token]]
        if field in raw and raw[field] != found:
            raise ModelError(
                f"{where}: {field} is {raw[field]}, but {CONTROL_TOKENS[token]} is {found} in the tokenizer. "
                "Use tokenizer and model of one checkpoint."
            )
    config = HiggsAudioV2Config(
        **{name: getattr(llama, name) for name in _SHARED},
        rope_parameters=llama.rope_parameters,
        pad_token_id=raw.get("pad_token_id"),
        bos_token_id=ids[CONTROL_TOKENS["begin_of_text"]],
        eos_token_id=ids[CONTROL_TOKENS["end_of_turn"]],
        num_codebooks=_positive_int(raw, "audio_num_codebooks", where),
        # the original counts neither BOS nor EOS
        codebook_size=_positive_int(raw, "audio_codebook_size", where) + 2,
        audio_token_id=ids[CONTROL_TOKENS["audio"]],
        audio_bos_token_id=ids[CONTROL_TOKENS["audio_bos"]],
        audio_delay_token_id=ids[CONTROL_TOKENS["audio_delay"]],
        audio_stream_bos_id=_positive_int(raw, "audio_stream_bos_id", where),
        audio_stream_eos_id=_positive_int(raw, "audio_stream_eos_id", where),
    )
    if raw.get("use_audio_out_self_attention"):
        return cross_attention_config(config.to_dict(), "audio_self")
    return config


def _positive_int(raw: Mapping[str, Any], field: str, where: str) -> int:
    value = raw.get(field)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{where}: {field} is {value!r}, needed a whole number above 0.")
    return value


def _check_options(raw: Mapping[str, Any], num_layers: int, where: str) -> None:
    """Refuse options with which the native model would compute something else."""
    adapter = raw.get("audio_adapter_type")
    layers = raw.get("audio_dual_ffn_layers")
    if not str(adapter).startswith("dual_ffn") or layers != list(range(num_layers)):
        raise ModelError(
            f"{where}: audio_adapter_type is {adapter!r} with audio_dual_ffn_layers {layers}, needed "
            f"dual_ffn in all {num_layers} layers, as in the released checkpoint."
        )
    for field in (*_OFF, *_ON):
        needed = field in _ON
        if bool(raw.get(field)) != needed:
            raise ModelError(
                f"{where}: {field} is {raw.get(field)!r}, needed "
                f"{str(needed).lower()}, as in the released checkpoint."
            )


def load_arguments(config: HiggsAudioV2Config) -> dict[str, Any]:
    """The arguments of `from_pretrained` that an original checkpoint needs besides its folder."""
    generation = GenerationConfig(  # as the original generates by default
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        ras_win_len=7,
        ras_win_max_num_repeat=2,
    )
    return {"config": config, "generation_config": generation, "key_mapping": NATIVE_NAMES}


def check_cross_attention(cross_attention: CrossAttention) -> None:
    """Check that the original code supports these new modules.

    Raises:
        ModelError: it does not.
    """
    if cross_attention not in ("off", "audio_self"):
        raise ModelError(
            f"cross_attention {cross_attention} is unknown to the original code, whose format "
            "supports audio_self only. Export it with --format native."
        )


def boson_config(
    config: HiggsAudioV2Config,
    ids: Mapping[str, int],
    dtype: torch.dtype,
    cross_attention: CrossAttention,
) -> dict[str, Any]:
    """Convert a native config to an original config.json.

    Args:
        config: the base's config.
        ids: token → id of its tokenizer, including the control tokens.
        dtype: of the weights.
        cross_attention: which new modules the weights include.

    Raises:
        ModelError: the original code cannot run this model.
    """
    check_cross_attention(cross_attention)
    size = config.codebook_size - 2
    if (config.audio_stream_bos_id, config.audio_stream_eos_id) != (size, size + 1):
        raise ModelError(
            f"the original code needs BOS {size} and EOS {size + 1} after {size} codes; the base has "
            f"{config.audio_stream_bos_id} and {config.audio_stream_eos_id}. Export with --format native."
        )
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta")
    end_of_text = ids.get("<|end_of_text|>", ids[CONTROL_TOKENS["end_of_turn"]])
    text = {name: getattr(config, name) for name in _SHARED} | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": ids[CONTROL_TOKENS["begin_of_text"]],
        "eos_token_id": end_of_text,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    optional = {"audio_in_token_idx": ids["<|AUDIO|>"]} if "<|AUDIO|>" in ids else {}
    return {
        "architectures": ["HiggsAudioModel"],
        "model_type": MODEL_TYPE,
        "text_config": text,
        "hidden_size": config.hidden_size,
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(config.num_hidden_layers)),
        "audio_ffn_hidden_size": config.hidden_size,
        "audio_ffn_intermediate_size": config.intermediate_size,
        "audio_decoder_proj_num_layers": 0,
        "audio_embed_avg": False,
        "audio_num_codebooks": config.num_codebooks,
        "audio_codebook_size": size,
        "audio_stream_bos_id": config.audio_stream_bos_id,
        "audio_stream_eos_id": config.audio_stream_eos_id,
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": CONTROL_TOKENS["audio_eos"],
        "audio_eos_token_id": ids[CONTROL_TOKENS["audio_eos"]],
        "audio_in_token": "<|AUDIO|>",
        "audio_out_token": CONTROL_TOKENS["audio"],
        "audio_out_token_idx": config.audio_token_id,
        "audio_out_bos_token": CONTROL_TOKENS["audio_bos"],
        "audio_out_bos_token_id": config.audio_bos_token_id,
        "encode_audio_in_tokens": True,
        "encode_whisper_embed": False,
        "pad_token_id": config.pad_token_id,
        "skip_audio_tower": True,
        "torch_dtype": text["torch_dtype"],
        "use_audio_out_embed_projector": False,
        "use_audio_out_self_attention": cross_attention == "audio_self",
        "use_delay_pattern": True,
        "use_rq_transformer": False,
    } | optional
