"""Starts training from an existing adapter's weights: this tool's, or plain PEFT's on the stock model."""

import logging
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from higgs_tune.base_source import is_embedded
from higgs_tune.config import ALPHA_POWERS, ALPHA_RANK, TrialConfig
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.model.initial import initial_weights
from higgs_tune.model.load import Base
from higgs_tune.model.snapshot import header
from higgs_tune.train.checkpoint import (
    MARK_NAME,
    PREFIX,
    WEIGHTS_NAME,
    read_lora_config,
    read_system_text,
)
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import AdapterState

logger = logging.getLogger(__name__)

# PEFT initialisations that take the adapter out of the base's weights, which then differ from the stock ones.
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_start(directory: Path, config: TrialConfig) -> None:
    """Check that an adapter has a trial's rank and scale, before anything large is loaded.

    Raises:
        ConfigError: its rank or scale differs.
        ModelError: it is not a readable PEFT LoRA adapter, its modules differ in rank or alpha, or it is
            more than LoRA factors on top of the stock weights.
    """
    adapter = read_lora_config(directory)
    if str(adapter.init_lora_weights).lower().startswith(_FROM_BASE):
        raise ModelError(
            f"run.start_from: {directory}: init_lora_weights {adapter.init_lora_weights!r} took a part of "
            "each weight out of the base, but this base has its whole weights. Save it with PEFT's "
            "path_initial_model_for_weight_conversion, or start from another adapter."
        )
    if adapter.alora_invocation_tokens:
        raise ModelError(
            f"run.start_from: {directory}: works only after its invocation tokens "
            "(alora_invocation_tokens), needed an adapter for every token. Start from another adapter."
        )
    if adapter.alpha_pattern or adapter.rank_pattern:
        raise ModelError(
            f"run.start_from: {directory}: its modules differ in rank or alpha (rank_pattern or "
            "alpha_pattern in adapter_config.json), needed the same for all. Start from another adapter."
        )
    if adapter.r != config.rank:
        raise ConfigError(
            f"run.start_from: {directory} has rank {adapter.r}, the trial {config.rank}. "
            f"Train with --set trial.rank={adapter.r}."
        )
    scale = adapter.lora_alpha / (math.sqrt(adapter.r) if adapter.use_rslora else adapter.r)
    if not math.isclose(scale, config.lora_alpha / config.rank, rel_tol=1e-6):
        growth = (config.rank / ALPHA_RANK) ** ALPHA_POWERS[config.alpha_rule]
        raise ConfigError(
            f"run.start_from: {directory} was trained at a scale (alpha / rank) of {scale:g}, the trial "
            f"has {config.lora_alpha / config.rank:g}, at which the same weights are another adapter. "
            f"Train with --set trial.alpha={scale * config.rank / growth:g}."
        )
    header(directory / WEIGHTS_NAME)


def warn_if_trained_differently(directory: Path, base: Base, system_text: str | None) -> None:
    """Warn if an adapter records another base or another system text than this run has.

    No error, because a base in another place may have the same weights.
    """
    adapter = read_lora_config(directory)
    then = (adapter.base_model_name_or_path or "", adapter.revision)
    now = (base.source, base.revision)
    if then[0] and _place(*then) != _place(*now):
        logger.warning(
            "run.start_from: %s was trained on the base %s, this run on %s: unless these have the same "
            "weights, the adapter does not start with the losses it ended with",
            directory,
            *(" at ".join(filter(None, named)) for named in (then, now)),
        )
    if not (directory / MARK_NAME).is_file():
        return  # a plain PEFT adapter does not record it
    told = read_system_text(directory)
    if told != system_text:
        logger.warning(
            "run.start_from: %s was trained with data.system_text %r, this run has %r",
            directory,
            told,
            system_text,
        )


def _place(source: str, revision: str | None) -> tuple[str, str | None]:
    """The base's folder, or Hub id and commit; "embedded" for the embedded base, wherever it lies."""
    if is_embedded(source):
        return "embedded", None
    folder = Path(source).expanduser()
    return (str(folder.resolve()), None) if folder.exists() else (source, revision)


def start_state(directory: Path, config: TrialConfig, engine: Engine) -> AdapterState:
    """The initial state of a trial that starts from an adapter: its weights, step 0, zero moments.

    Parameters that the adapter lacks start as in a fresh trial, which does not change the losses.

    Raises:
        ModelError: the file is damaged, not finite, or has weights that the trial does not train.
    """
    path = directory / WEIGHTS_NAME
    header(path)
    saved = {name.removeprefix(PREFIX): tensor.float() for name, tensor in load_file(path).items()}
    weights = initial_weights(engine.base.model, engine.lora_groups, config)
    _check(path, saved, weights)
    weights |= saved
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return AdapterState(0, weights, zeros, zeros)


def _check(path: Path, saved: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    for name, tensor in saved.items():
        if name not in needed:
            raise ModelError(
                f"{path}: has {name}, which trial.targets and trial.cross_attention do not train; it "
                "would be lost. Train what the adapter trained, or more."
            )
        if tensor.shape != needed[name].shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, needed "
                f"{tuple(needed[name].shape)}. Start from an adapter of this base."
            )
        if not tensor.isfinite().all():
            raise ModelError(
                f"{path}: {name} is not finite: that training diverged. Start from an earlier checkpoint."
            )
        # for a new module's weight, `twin` is the same name
        one, other = (".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")
        if (twin := name.replace(one, other)) not in saved:
            raise ModelError(f"{path}: has {name} without {twin}. Save the adapter again.")
    if not saved:
        raise ModelError(f"{path}: has no weights. Start from another adapter.")
