"""Load a frozen base with its text head, tokenizer and control tokens, and check that they match."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoTokenizer,
    HiggsAudioV2Config,
    HiggsAudioV2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from higgs_tune.base_source import local_folder
from higgs_tune.config import BaseSettings
from higgs_tune.data.tokens import AUDIO_IN_BOS, CONTROL_TOKENS, Vocabulary
from higgs_tune.device import resolve_device
from higgs_tune.errors import ConfigError, ModelError, NoMemoryError, is_out_of_memory
from higgs_tune.model import boson
from higgs_tune.model.audio_attention import (
    CrossAttentionConfig,
    CrossAttentionHiggsAudioV2ForConditionalGeneration,
    cross_attention_of,
)
from higgs_tune.model.compile_cache import prepare_compile
from higgs_tune.model.snapshot import check_tensors, read_object, stored_tensors
from higgs_tune.model.template import check_template

_CONFIG_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # the tokenizer's included
_TEXT_HEAD = "text_lm_head.weight"
_MODEL_TYPES = {cls.model_type: cls for cls in (HiggsAudioV2Config, CrossAttentionConfig)}
_ORIGINAL_HEADS = {f"audio_decoder_proj.{kind}_lm_head.weight" for kind in ("audio", "text")}


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model and what is needed to encode sequences for it."""

    model: HiggsAudioV2ForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary
    source: str  # the base's name in an adapter's files
    revision: str | None = None  # commit, if the source is a Hub id
    folder: Path | None = None  # the checkpoint's folder, if there is one
    compile: bool = False  # run training's forward under torch.compile


def control_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token → id of the whole tokenizer, with all control tokens.

    Raises:
        ModelError: a control token is missing.
    """
    known = tokenizer.get_vocab()
    missing = sorted(set(CONTROL_TOKENS.values()) - known.keys())
    if missing:
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path}: control tokens {missing} are missing. "
            "Use the tokenizer that belongs to the Higgs Audio V2 checkpoint."
        )
    return known


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: HiggsAudioV2Config) -> Vocabulary:
    """Look up the control tokens by name and check them against the model's config.

    Raises:
        ModelError: a control token is missing, tokenizer and config disagree about one, or the config's
            vocab_size or codebook_size is too small.
    """
    known = control_ids(tokenizer)
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
    if max(known.values()) >= config.vocab_size:
        raise ModelError(
            f"tokenizer of {tokenizer.name_or_path} has ids up to {max(known.values())}, but the model's "
            f"vocab_size is {config.vocab_size}. Use tokenizer and model of one checkpoint."
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
        audio_in_bos=known.get(AUDIO_IN_BOS),
        unknown=tokenizer.unk_token_id,  # type: ignore[arg-type]  # a list only for several tokens
    )


def load_base(settings: BaseSettings) -> Base:
    """Load a checkpoint with its text head for training: frozen, in eval mode.

    Raises:
        ConfigError: a Hub id without a revision, a GPU that does not exist, an attention that
            training does not support, or no compiler for `base.compile`.
        ModelError: the folder is not a checkpoint of this model, lacks a text head that `base.text_head`
            requires, or already has cross-attention modules.
        NoMemoryError: it does not fit in memory.
    """
    if settings.attention != "sdpa":
        raise ConfigError(
            f"base.attention: found {settings.attention}, but training has its own forward with "
            "torch's SDPA. Leave it at sdpa; other values are for running whole models, as in generation."
        )
    if settings.compile:
        prepare_compile(resolve_device(settings.device, "base.device"))
    base = replace(load_checkpoint(settings), compile=settings.compile)
    found = cross_attention_of(base.model.config)
    if found != "off":
        raise ModelError(
            f"base.path: {base.source} already has {found} modules. A trial adds, trains and saves such "
            "modules beside a stock base; those of the base would be ignored. Train on the checkpoint "
            "without them; this one can generate and be exported."
        )
    return base


def load_checkpoint(settings: BaseSettings, *, keep_dtype: bool = False) -> Base:
    """Load any checkpoint of this model with its text head, frozen, in eval mode.

    Reads the native format, the original `boson_multimodal` format (weights are renamed while they are
    read, nothing is written), and merged checkpoints with cross-attention modules. Weights go straight to
    the device, shard by shard.

    Args:
        settings: what to load, and how.
        keep_dtype: keep the dtype in which the weights are stored instead of `settings.dtype`.

    Raises:
        ConfigError: a Hub id without a revision, or a GPU that does not exist.
        ModelError: the folder is not a checkpoint of this model, or lacks a text head that
            `settings.text_head` requires.
        NoMemoryError: it does not fit in memory.
    """
    device = resolve_device(settings.device, "base.device")
    source, folder = locate(settings)
    config, tokenizer = read_config(folder)
    is_original = read_object(folder / "config.json")["model_type"] == boson.MODEL_TYPE
    vocabulary = vocabulary_of(tokenizer, config)
    check_template(tokenizer, vocabulary)
    cls = HiggsAudioV2ForConditionalGeneration
    if cross_attention_of(config) != "off":
        cls = CrossAttentionHiggsAudioV2ForConditionalGeneration
    has_head, stored = _check_weights(cls, config, folder, settings)
    dtype = stored if keep_dtype else getattr(torch, settings.dtype)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # a bar in a log file is noise
    try:
        model: HiggsAudioV2ForConditionalGeneration = cls.from_pretrained(
            str(folder),
            use_text_head=has_head,
            dtype=dtype,
            attn_implementation=settings.attention,
            device_map={"": device},
            **(boson.load_arguments(config) if is_original else {}),
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
        ImportError,
        SafetensorError,
    ) as error:
        if is_out_of_memory(error):
            others = "device" if keep_dtype else "base.device or base.dtype"
            raise NoMemoryError(
                f"base.path: {source} does not fit in memory on {device} as "
                f"{str(dtype).removeprefix('torch.')}: {error}. Free some memory, or choose another {others}."
            ) from error
        raise ModelError(f"base.path: {source} cannot be loaded: {error}") from error
    # else PEFT and save_pretrained would use the original names
    model._weight_conversions = None  # type: ignore[assignment]
    if not has_head:
        embedding = model.model.embed_tokens.weight
        head = nn.Linear(*reversed(embedding.shape), bias=False, device="meta")
        head.weight = nn.Parameter(embedding.detach().clone())
        model.text_lm_head = head
    model.requires_grad_(False).eval()
    revision = settings.revision if source != str(folder) else None
    return Base(model, tokenizer, vocabulary, source, revision, folder)


def locate(settings: BaseSettings, *, weights: bool = True) -> tuple[str, Path]:
    """The base's name in an adapter's files, and its folder, downloaded if it is a Hub id.

    Args:
        weights: whether to download the weights, too.

    Raises:
        ConfigError: a Hub id without a revision.
        ModelError: not found, or it cannot be downloaded.
    """
    local = local_folder(settings)
    if local is not None:
        return str(local), local
    source = settings.path
    files = [*_CONFIG_FILES, *(["*.safetensors"] if weights else [])]
    try:
        folder = snapshot_download(source, revision=settings.revision, allow_patterns=files)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base.path: {source} at {settings.revision} cannot be downloaded: {error}"
        ) from error
    return source, Path(folder)


def on_one_line(error: StrictDataclassError) -> str:
    """What a config's own check says is wrong."""
    return " ".join(str(error).split())


def read_config(folder: Path) -> tuple[HiggsAudioV2Config, PreTrainedTokenizerBase]:
    """The native config of a checkpoint in any format, and its tokenizer; reads no weights.

    Raises:
        ModelError: the config or the tokenizer cannot be read or is not of this model, or hidden_act is
            not silu.
    """
    where = f"base.path: {folder / 'config.json'}"
    raw = read_object(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type not in {*_MODEL_TYPES, boson.MODEL_TYPE}:
        raise ModelError(
            f"{where}: model_type is {model_type!r}, needed {HiggsAudioV2Config.model_type!r} (the native "
            f"transformers format) or {boson.MODEL_TYPE!r} (the original one)."
        )
    try:
        # all formats have the native model's tokenizer, whatever model_type is
        tokenizer = AutoTokenizer.from_pretrained(folder, config=HiggsAudioV2Config())
        if model_type == boson.MODEL_TYPE:
            config = boson.native_config(raw, control_ids(tokenizer), where)
        else:
            config = _MODEL_TYPES[model_type].from_dict(raw)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"base.path: {folder} cannot be loaded: {error}") from error
    except StrictDataclassError as error:
        raise ModelError(f"{where} cannot be loaded: {on_one_line(error)}") from error
    if config.hidden_act != "silu":  # `packed_ops.swiglu`
        raise ModelError(
            f"{where}: hidden_act is {config.hidden_act!r}, needed 'silu': training supports no other."
        )
    return config, tokenizer


def _check_weights(
    cls: type[HiggsAudioV2ForConditionalGeneration],
    config: HiggsAudioV2Config,
    folder: Path,
    settings: BaseSettings,
) -> tuple[bool, torch.dtype]:
    """Whether there is a text head, and the weights' dtype; checks all names and shapes first."""
    where = f"base.path: {folder}"
    stored = stored_tensors(folder)
    if config.model_type == HiggsAudioV2Config.model_type and stored.keys() >= _ORIGINAL_HEADS:
        # converted checkpoints can also have the heads under their original names
        native = {name: value for name, value in stored.items() if name not in _ORIGINAL_HEADS}
        stored = native if "audio_lm_head.weight" in native else stored
    stored = {boson.native_name(name): value for name, value in stored.items()}
    with torch.device("meta"):
        model = cls(config, use_text_head=True)
    needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    has_head = _TEXT_HEAD in stored
    if not has_head and settings.text_head == "checkpoint":
        raise ModelError(
            f"{where} has no {_TEXT_HEAD}, so there is no text loss to tune. Use a checkpoint that was "
            "saved with use_text_head=True, or set base.text_head (--text-head) to from_embedding to start "
            "the head as a copy of the token embedding."
        )
    if not has_head:
        del needed[_TEXT_HEAD]
    check_tensors(where, stored, needed)
    return has_head, stored["model.embed_tokens.weight"].dtype
