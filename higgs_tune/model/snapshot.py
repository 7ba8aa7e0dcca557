"""The contents of a checkpoint folder, from its JSON files and the headers of its shards.

Damaged or mismatched files are found here, before any weights are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from higgs_tune.errors import ModelError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: it cannot be read, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: not a JSON object. Download the checkpoint again.")
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name → shape and dtype of every tensor in a folder's safetensors files.

    Raises:
        ModelError: there are no weights, the index is damaged, it names a file or a tensor that is not
            there, or a file is cut off, damaged or quantised.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: no weight_map. Download the checkpoint again.")
    elif (folder / WEIGHTS).is_file():
        weight_map = {}
    else:
        raise ModelError(
            f"{folder}: found neither {WEIGHTS} nor {INDEX}; give a checkpoint folder."
        )
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())) or [WEIGHTS]:
        if not (folder / name).is_file():
            raise ModelError(
                f"{index}: names {name}, which is not there. Download the checkpoint again."
            )
        found |= header(folder / name)
    absent = sorted(weight_map.keys() - found.keys())
    if absent:
        raise ModelError(
            f"{index}: names {len(absent)} tensors that no file holds, {absent[0]} among them. "
            "Download the checkpoint again."
        )
    return found


def header(path: Path) -> dict[str, Stored]:
    """Name → shape and dtype of the tensors in one safetensors file.

    Raises:
        ModelError: missing, cut off, damaged or quantised.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }
    except KeyError as error:
        raise ModelError(
            f"{path}: tensors of type {error}, needed one of {sorted(_DTYPES)}. "
            "Use a checkpoint that is not quantised."
        ) from None
    except FileNotFoundError:
        raise ModelError(
            f"{path}: not there. Give a folder whose weights are saved as safetensors."
        ) from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cut off or damaged ({error}). Download it again.") from None


def check_tensors(
    where: str, stored: Mapping[str, Stored], needed: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that exactly the tensors that a model needs are stored, by name and shape.

    Raises:
        ModelError: tensors are missing, unknown or of the wrong shape.
    """
    missing, unknown = (
        sorted(a.keys() - b.keys()) for a, b in ((needed, stored), (stored, needed))
    )
    if missing:
        raise ModelError(
            f"{where} lacks {len(missing)} weights, {missing[0]} among them. "
            "Download the checkpoint again, or correct its config.json."
        )
    if unknown:
        raise ModelError(
            f"{where} has {len(unknown)} weights that its config.json has no place for, {unknown[0]} "
            "among them; they would be ignored silently. Correct config.json or use another checkpoint."
        )
    for name, shape in needed.items():
        if stored[name].shape != shape:
            raise ModelError(
                f"{where}: {name} has shape {stored[name].shape}, but its config.json needs {shape}. "
                "Use weights and config.json of one checkpoint."
            )
