import os
import subprocess
import sys

import pytest
import torch

from higgs_tune.device import resolve_device
from higgs_tune.errors import ConfigError


@pytest.mark.parametrize("setting", ["base.device", "--device"])
@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "mps", "meta"])
def test_an_unknown_or_unsupported_device_name_is_a_config_error(name: str, setting: str):
    with pytest.raises(ConfigError, match=f"{setting}: found {name!r}, which names no device"):
        resolve_device(name, setting)


def test_a_missing_gpu_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="found 'cuda:99', but torch sees no GPU"):
        resolve_device("cuda:99", "--device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="found 'cuda:99', but torch sees 2 GPUs"):
        resolve_device("cuda:99", "--device")


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch: pytest.MonkeyPatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnn_attention_is_turned_off_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert resolve_device("cpu", "--device").type == "cpu"
    assert torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("cuda", "--device").type == "cuda"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch):
    for found, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: int(found))
        assert resolve_device("auto", "base.device").type == device


GPU = """
import torch
from higgs_tune.device import resolve_device
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
resolve_device("cuda", "base.device")
print(torch._C._cuda_memorySnapshot(None)["allocator_settings"]["expandable_segments"])
"""


@pytest.mark.parametrize(
    ("own", "expandable"),
    [
        ({}, True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, False),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False),
    ],
)
def test_gpu_memory_segments_are_expandable_unless_the_user_sets_it(own, expandable):
    told = {n: v for n, v in os.environ.items() if "ALLOC_CONF" not in n} | own
    done = subprocess.run([sys.executable, "-c", GPU], env=told, capture_output=True, text=True)
    assert done.stdout.strip() == str(expandable), done.stderr
