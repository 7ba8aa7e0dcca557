"""Loading a base: what is wrong with it is one clear error."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from higgs_tune.config import BaseSettings
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.model.load import load_base, resolve_device
from tests.models import tiny_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder without a tokenizer: no test here gets that far."""
    tiny_base().model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path):
    return load_base(BaseSettings(path=str(folder), device="cpu"))


def test_a_truncated_weight_file_is_a_model_error(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"base\.path: .*base cannot be loaded"):
        load(folder)


def test_weights_of_other_shapes_are_a_model_error(folder: Path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["text_lm_head.weight"] = torch.zeros(3, 5)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"base\.path: .*base cannot be loaded"):
        load(folder)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_a_config_error(name: str):
    with pytest.raises(ConfigError, match=r"base\.device: found .* names no device"):
        resolve_device(name)
