"""Adapters on disk: PEFT's format, plus what training needs to resume.

`adapter_config.json` and `adapter_model.safetensors` load with plain PEFT onto the stock model. New
cross-attention modules are stored there whole; `higgs_tune.json` records their mode, and this module
refuses to load them onto a base without such modules.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.errors import ModelError, is_out_of_memory
from higgs_tune.files import share_weights
from higgs_tune.model.audio_attention import cross_attention_of, with_cross_attention
from higgs_tune.model.new_modules import MODULE_NAMES
from higgs_tune.model.snapshot import header, read_object
from higgs_tune.model.targets import lora_regex
from higgs_tune.train.residents import AdapterState

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
MARK_NAME, STATE_NAME = "higgs_tune.json", "training_state.safetensors"
_INTERVAL = "training_state.json"


def lora_config(config: TrialConfig, base_source: str, revision: str | None = None) -> LoraConfig:
    """The `peft.LoraConfig` of a trial, without a task_type, which would inject `labels=`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides it: a float works
        lora_dropout=config.dropout,
        target_modules=lora_regex(config.targets),
        modules_to_save=list(MODULE_NAMES[config.cross_attention]) or None,
        base_model_name_or_path=base_source,
        revision=revision,
    )


def read_lora_config(directory: Path) -> LoraConfig:
    """Read an adapter's adapter_config.json.

    Raises:
        ModelError: it is missing, not readable, or not a LoRA's.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise ModelError(f"{directory}: {_describe_missing(directory, CONFIG_NAME)}")
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{directory}: no readable {CONFIG_NAME}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{directory}: an adapter of type {config.peft_type}, needed LORA.")
    return config


def save_adapter(
    directory: Path,
    state: AdapterState,
    config: TrialConfig,
    base_source: str,
    revision: str | None = None,
    system_text: str | None = None,
) -> None:
    """Write the adapter and its training state into an existing, empty folder.

    `revision` is the commit of a base given as a Hub id; merging needs the same one. `system_text` is
    data.system_text, which later prompts need.
    """
    lora_config(config, base_source, revision).save_pretrained(str(directory))
    weights = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in state.weights.items()}
    save_file(weights, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    mark = {
        "cross_attention": config.cross_attention,
        "system_text": system_text,
        "trial": config.model_dump(mode="json"),
    }
    (directory / MARK_NAME).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    moments = {f"exp_avg.{name}": tensor.contiguous() for name, tensor in state.exp_avg.items()}
    moments |= {
        f"exp_avg_sq.{name}": tensor.contiguous() for name, tensor in state.exp_avg_sq.items()
    }
    save_file(moments, directory / STATE_NAME, metadata={"step": str(state.step)})
    share_weights(directory)


def load_state(directory: Path) -> AdapterState:
    """Read back what `save_adapter` wrote.

    Raises:
        ModelError: a file is missing or damaged.
    """
    try:
        weights = load_file(directory / WEIGHTS_NAME)
        with safe_open(directory / STATE_NAME, framework="pt") as file:
            step = int(file.metadata()["step"])
            moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{directory}: not a readable adapter with its training state: {error}"
        ) from error

    def part(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    return AdapterState(
        step, part(PREFIX, weights), part("exp_avg.", moments), part("exp_avg_sq.", moments)
    )


def save_interval(directory: Path, interval: dict[str, Any]) -> None:
    """Write the state of the interval since the last report beside the training state."""
    (directory / _INTERVAL).write_text(json.dumps(interval) + "\n", encoding="utf-8")


def load_interval(directory: Path) -> dict[str, Any]:
    """Read back what `save_interval` wrote; empty for a checkpoint without it.

    Raises:
        ModelError: the file is damaged.
    """
    path = directory / _INTERVAL
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable: {error}") from error


def read_step(directory: Path) -> int:
    """The number of optimizer steps that a checkpoint has done.

    Raises:
        ModelError: its training state is missing or damaged.
    """
    try:
        with safe_open(directory / STATE_NAME, framework="pt") as file:
            return int(file.metadata()["step"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{directory}: no readable training state: {error}") from error


def load_weights(directory: Path, config: TrialConfig) -> AdapterState:
    """Read a finished adapter's weights; works for one exported without its training state.

    The state has no moments: the adapter can be evaluated, but not trained further.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        saved = load_file(directory / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{directory}: not a readable adapter: {error}") from error
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}
    return AdapterState(config.num_steps, weights, {}, {})


def read_trial(directory: Path) -> TrialConfig:
    """The settings that an adapter was trained with.

    Raises:
        ModelError: the folder is not a higgs-tune adapter.
        ConfigError: a setting is unknown or out of bounds.
    """
    path = directory / MARK_NAME
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))["trial"]
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{directory}: {_describe_missing(directory, MARK_NAME)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: no readable trial settings ({error!r}), needed an adapter's. A merged checkpoint has "
            "none: it is a base. Give an adapter that a sweep, `train` or `export` wrote."
        ) from None
    return validate(TrialConfig, trial, str(directory / MARK_NAME))


def read_system_text(directory: Path) -> str | None:
    """The system text that an adapter, or an adapter merged into a base, was trained with, if any.

    Raises:
        ModelError: `higgs_tune.json` cannot be read.
    """
    path = directory / MARK_NAME
    return read_object(path).get("system_text") if path.is_file() else None


def _describe_missing(directory: Path, needed: str) -> str:
    """Say what was found in place of an adapter, and what to give instead."""
    found = (
        f"no {needed} in it, so it is not an adapter" if directory.is_dir() else "no such folder"
    )
    inside = [directory / name for name in ("best_adapter", "adapter")]
    here = [str(folder) for folder in inside if (folder / needed).is_file()]
    there = "one that a sweep or `train` wrote, such as results/quick/best_adapter"
    return f"{found}. Give {' or '.join(here) or there}."


def load_adapter(base: HiggsAudioV2ForConditionalGeneration, directory: Path) -> PeftModel:
    """Load a saved adapter, new modules included, onto a stock base with PEFT.

    Raises:
        ModelError: not a higgs-tune adapter, the base's shapes differ, or the base already has such modules.
    """
    trial = read_trial(directory)
    model = with_cross_attention(base, trial.cross_attention, seed=None)
    return attach_adapter(model, directory)


@contextmanager
def adapted(
    base: HiggsAudioV2ForConditionalGeneration, directory: Path | None
) -> Iterator[HiggsAudioV2ForConditionalGeneration]:
    """Put an adapter, if one is given, onto a base within the block; afterwards the base is as before.

    Raises:
        ModelError: see `load_adapter`.
    """
    if directory is None:
        yield base
        return
    wrapped: Any = load_adapter(base, directory)
    try:
        yield wrapped.get_base_model()
    finally:
        wrapped.unload()  # puts back the base's linears, which PEFT wrapped


def attach_adapter(model: HiggsAudioV2ForConditionalGeneration, directory: Path) -> PeftModel:
    """Load an adapter onto a model that already has the modules it needs.

    Raises:
        ModelError: not a higgs-tune adapter, its files do not belong together, the model has other
            cross-attention modules or lacks the text head that it adapts, or the shapes differ.
    """
    trial = read_trial(directory)
    mode = trial.cross_attention
    found = cross_attention_of(model.config)
    if mode != found:
        raise ModelError(
            f"{directory}: the adapter was trained with cross_attention {mode}, the base has {found}. "
            "Its modules would be left out silently; load it with higgs_tune.train.checkpoint.load_adapter."
        )
    if "text_head" in trial.targets and model.text_lm_head is None:
        raise ModelError(
            f"{directory}: the adapter targets text_head, and the base has no text_lm_head. Its part "
            "would be left out silently; load the base with use_text_head=True."
        )
    try:
        return _wrapped(model, directory)
    except Exception:  # re-raised; PEFT wraps the base before it reads weights that may not fit
        _unwrap(model)
        raise


def _wrapped(model: HiggsAudioV2ForConditionalGeneration, directory: Path) -> PeftModel:
    stored = header(directory / WEIGHTS_NAME)
    try:
        with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5.23 renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # by default PEFT would load it onto any GPU it finds
            device = str(model.device)
            wrapped = PeftModel.from_pretrained(model, str(directory), torch_device=device).eval()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{directory}: does not fit this base: {error}") from error
    needed = get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    if needed != stored.keys():  # PEFT only warns, and leaves the rest as it was initialised
        odd = min(needed ^ stored.keys())
        raise ModelError(
            f"{directory}: {WEIGHTS_NAME} and adapter_config.json do not belong together: they differ "
            f"in {odd}. Save the adapter again."
        )
    return wrapped


def _unwrap(model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Put back the base's linears, which PEFT wrapped in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
