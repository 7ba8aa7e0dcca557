"""Exports an adapter: as it is, merged into a native checkpoint, or merged for the original code."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import save_torch_state_dict
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration
from transformers.utils import logging as hf_logging

from higgs_tune.base_source import named_here
from higgs_tune.config import BaseSettings, TrialConfig
from higgs_tune.files import RESUME_FILES, share_weights, writing
from higgs_tune.local_path import refuse_existing
from higgs_tune.model.boson import boson_config, boson_name, check_cross_attention
from higgs_tune.model.load import Base, control_ids, load_checkpoint
from higgs_tune.model.snapshot import header
from higgs_tune.train.checkpoint import (
    MARK_NAME,
    WEIGHTS_NAME,
    load_adapter,
    read_lora_config,
    read_system_text,
    read_trial,
)

MAX_SHARD = "5GB"
# Files that a checkpoint needs beside weights and config.json; copied if the base has them.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
)
_PROCESSOR_FILES = ("*processor_config.json",)


def copy_adapter(adapter: Path, out: Path) -> None:
    """Copy an adapter without the files that only a resumed training needs.

    Raises:
        ModelError: not a higgs-tune adapter.
        ConfigError: `out` exists.
        DataError: `out` cannot be written.
    """
    read_trial(adapter)
    header(adapter / WEIGHTS_NAME)
    ignore = shutil.ignore_patterns(*RESUME_FILES)
    with _new_folder(out) as folder, _writing(out):
        shutil.copytree(adapter, folder, ignore=ignore, dirs_exist_ok=True)


def adapter_base(
    adapter: Path, path: str | None, revision: str | None, device: str
) -> BaseSettings:
    """The base that an adapter names, or another copy of it at `path`.

    Raises:
        ModelError: the adapter's config cannot be read.
    """
    config = read_lora_config(adapter)
    assert config.base_model_name_or_path is not None
    named = path or named_here(config.base_model_name_or_path)
    return BaseSettings(
        path=named,
        revision=revision or (None if path else config.revision),
        device=device,
        # if the base has no text head, the adapter was trained on one that started this way
        text_head="from_embedding",
    )


def export_merged(
    adapter: Path, out: Path, settings: BaseSettings, to: Literal["native", "boson"]
) -> Base:
    """Write the base with the adapter merged into it, in the base's stored dtype.

    Args:
        adapter: a folder that `save_adapter` wrote.
        out: a new folder.
        settings: the adapter's base.
        to: "native" for transformers, "boson" for the original code.

    Returns:
        The base, which now has the merged weights.

    Raises:
        ConfigError: `out` exists.
        DataError: `out` cannot be written.
        ModelError: not an adapter, not its base, or a model that the format cannot represent.
    """
    trial = read_trial(adapter)
    if to == "boson":
        check_cross_attention(trial.cross_attention)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    with _new_folder(out) as folder:
        base = load_checkpoint(settings, keep_dtype=True)
        config: dict[str, Any] = {}
        if to == "boson":  # refuse before merging
            ids, dtype = control_ids(base.tokenizer), base.model.dtype
            config = boson_config(base.model.config, ids, dtype, trial.cross_attention)
        model = merge(base.model, adapter)
        with _writing(out):
            if to == "boson":
                _write_boson(model, config, folder)
            else:
                model.save_pretrained(folder, max_shard_size=MAX_SHARD)
            _write_side_files(base, trial, read_system_text(adapter), settings.revision, to, folder)
    return base


def merge(
    model: HiggsAudioV2ForConditionalGeneration, adapter: Path
) -> HiggsAudioV2ForConditionalGeneration:
    """Merge an adapter into a base, in place; new modules become part of the model returned.

    Each LoRA product is added in float32 and rounded once, to the base's dtype.
    """
    adapted = load_adapter(model, adapter)
    for module in adapted.modules():
        if isinstance(module, LoraLinear):
            linear = module.get_base_layer()
            assert isinstance(linear, nn.Linear)
            weight = linear.weight.data
            weight.copy_(weight.float() + module.get_delta_weight("default").float())
    merged: HiggsAudioV2ForConditionalGeneration = adapted.unload()
    return merged.requires_grad_(False).eval()


def _write_side_files(
    base: Base,
    trial: TrialConfig,
    system_text: str | None,
    revision: str | None,
    to: Literal["native", "boson"],
    folder: Path,
) -> None:
    """Write what belongs beside weights and config: the base's tokenizer and `higgs_tune.json`."""
    assert base.folder is not None
    patterns = _TOKENIZER_FILES + (_PROCESSOR_FILES if to == "native" else ())
    for source in {path for pattern in patterns for path in base.folder.glob(pattern)}:
        shutil.copy(source, folder)
    note = {
        "use_text_head": True,
        "merged": {"base": base.source, "revision": revision},
        "cross_attention": trial.cross_attention,
        "system_text": system_text,
        "merged_trial": trial.model_dump(mode="json"),
    }
    (folder / MARK_NAME).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    share_weights(folder)


def _write_boson(
    model: HiggsAudioV2ForConditionalGeneration, config: dict[str, Any], folder: Path
) -> None:
    weights = {boson_name(name): tensor for name, tensor in model.state_dict().items()}
    save_torch_state_dict(weights, folder, max_shard_size=MAX_SHARD)
    text = config["text_config"]
    generation = {"bos_token_id": text["bos_token_id"], "eos_token_id": text["eos_token_id"]}
    generation["pad_token_id"] = config["pad_token_id"]
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Make a temporary folder beside `out`, and rename it to `out` if the block succeeds."""
    refuse_existing(out)
    fresh = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with _writing(out):
        fresh.mkdir(parents=True)
    try:
        yield fresh
        with _writing(out):
            fresh.rename(out)
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _writing(out: Path) -> AbstractContextManager[None]:
    return writing(out, "Nothing was left there. Free space, or give another --out.")
