"""Load a frozen base with its text head, tokenizer and control tokens, and check that they fit."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from higgs_tune.config import BaseSettings
from higgs_tune.data.tokens import CONTROL_TOKENS, Vocabulary
from higgs_tune.errors import ConfigError, ModelError

EMBEDDED_BASE = Path(__file__).parent.parent / "embedded" / "base"


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model and what is needed to write sequences for it."""

    model: HiggsAudioV2ForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    source: str  # what an adapter names as its base


def resolve_device(name: str) -> torch.device:
    """Turn "auto" into the GPU if there is one.

    Raises:
        ConfigError: no device has this name, or a CUDA device is named and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"base.device: found {name!r}, which names no device. Use auto, cpu, cuda or cuda:N."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"base.device: found {name!r}, but torch sees no GPU. Use auto or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"base.device: found {name!r}, but torch sees {torch.cuda.device_count()} GPUs, "
            "counted from 0."
        )
    return device


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config) -> Vocabulary:
    """Look the control tokens up by name and check them against the model's config.

    Raises:
        ModelError: a control token is missing, or tokenizer and config disagree about one.
    """
    known = tokenizer.get_vocab()
    missing = sorted(set(CONTROL_TOKENS.values()) - known.keys())
    if missing:
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path}: control tokens {missing} are missing. "
            "Use the tokenizer that belongs to the Higgs Audio V2 checkpoint."
        )
    ids = {name: known[token] for name, token in CONTROL_TOKENS.items()}
    for name, expected in (
        ("audio", config.audio_token_id),
        ("audio_bos", config.audio_bos_token_id),
        ("audio_delay", config.audio_delay_token_id),
    ):
        if ids[name] != expected:
            raise ModelError(
                f"{CONTROL_TOKENS[name]} is {ids[name]} in the tokenizer of {tokenizer.name_or_path} "
                f"and {expected} in the model's config. Use tokenizer and model of one checkpoint."
            )
    if max(config.audio_stream_bos_id, config.audio_stream_eos_id) >= config.codebook_size:
        raise ModelError(
            f"codebook_size {config.codebook_size} cannot hold EOS ({config.audio_stream_eos_id}); "
            f"set it to {max(config.audio_stream_bos_id, config.audio_stream_eos_id) + 1} in config.json."
        )
    return Vocabulary(
        **ids,
        stream_bos=config.audio_stream_bos_id,
        stream_eos=config.audio_stream_eos_id,
        num_codebooks=config.num_codebooks,
        encode_text=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )


def load_base(settings: BaseSettings) -> Base:
    """Load a native checkpoint with its text head, frozen, in eval mode.

    Raises:
        ConfigError: a Hub id without a revision, or a GPU that is not there.
        ModelError: the folder is not a checkpoint, or it has no text head.
    """
    device = resolve_device(settings.device)
    source = str(EMBEDDED_BASE) if settings.path == "embedded" else settings.path
    local = Path(source).expanduser()
    if local.exists():
        source = str(local)
        _check_folder(local)
    elif source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(
            f"base.path: {source} does not exist. Give a local checkpoint folder, "
            "a Hub id (owner/name) with base.revision, or embedded."
        )
    elif settings.revision is None:
        raise ConfigError(
            f"base.revision: not set for Hub id {source}. Its files were rewritten in place once; "
            "pin the commit that you want."
        )
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # a bar in a log file is noise
    try:
        loaded: Any = HiggsAudioV2ForConditionalGeneration.from_pretrained(
            source,
            revision=settings.revision or "main",
            use_text_head=True,
            dtype=getattr(torch, settings.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=settings.revision or "main")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"base.path: {source} cannot be loaded: {error}") from error
    model: HiggsAudioV2ForConditionalGeneration = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if "text_lm_head.weight" in missing:
        raise ModelError(
            f"base.path: {source} has no text_lm_head.weight, so there is no text loss to tune. "
            "Use a checkpoint that was saved with use_text_head=True."
        )
    if missing:
        raise ModelError(
            f"base.path: {source} lacks {len(missing)} weights, {missing[0]} among them. "
            "Download the checkpoint again."
        )
    model.requires_grad_(False).eval()
    model.to(device=device)  # type: ignore[call-arg]
    return Base(model, tokenizer, vocabulary_of(tokenizer, model.config), source)


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"base.path: {folder} holds no config.json; give a checkpoint folder.")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{config}: not a JSON object: {error}") from None
    if model_type != "higgs_audio_v2":
        raise ModelError(
            f"{config}: model_type is {model_type!r}, needed 'higgs_audio_v2' "
            "(the native transformers format)."
        )
