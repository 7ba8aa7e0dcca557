"""A base that does not fit in memory is not reported as a faulty checkpoint."""

import pytest
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import BaseSettings
from higgs_tune.errors import ModelError, NoMemoryError
from higgs_tune.model.load import load_base, load_checkpoint
from higgs_tune.sweep.worker.pack import load_error
from tests.checkpoints import write_native
from tests.models import tiny_base

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB"),
    RuntimeError("error(s) in converting weights: CUDA out of memory. Tried to allocate 7 GiB"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_reported_and_lets_a_worker_try_again(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    folder = write_native(tmp_path / "base", tiny_base().model)
    monkeypatch.setattr(HiggsAudioV2ForConditionalGeneration, "from_pretrained", fail)
    with pytest.raises(
        NoMemoryError, match=r"base\.path: .* does not fit in memory on cpu"
    ) as found:
        load_base(BaseSettings(path=str(folder), device="cpu"))
    assert isinstance(load_error(found.value, "10.0.0.2"), NoMemoryError)


def test_a_merge_that_does_not_fit_names_the_stored_dtype(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    folder = write_native(tmp_path / "base", tiny_base(dtype=torch.bfloat16).model)
    monkeypatch.setattr(HiggsAudioV2ForConditionalGeneration, "from_pretrained", fail)
    message = r"on cpu as bfloat16: .* or choose another device\.$"
    with pytest.raises(NoMemoryError, match=message):
        load_checkpoint(BaseSettings(path=str(folder), device="cpu"), keep_dtype=True)


def test_another_error_is_blamed_on_the_checkpoint(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("size mismatch")

    folder = write_native(tmp_path / "base", tiny_base().model)
    monkeypatch.setattr(HiggsAudioV2ForConditionalGeneration, "from_pretrained", fail)
    with pytest.raises(ModelError, match="cannot be loaded: size mismatch"):
        load_base(BaseSettings(path=str(folder), device="cpu"))
