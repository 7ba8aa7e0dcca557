import pytest
import torch

from higgs_tune.device import resolve_device
from higgs_tune.errors import ConfigError


@pytest.mark.parametrize("setting", ["base.device", "--device"])
@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_a_name_of_no_device_is_a_config_error(name: str, setting: str):
    with pytest.raises(ConfigError, match=f"{setting}: found {name!r}, which names no device"):
        resolve_device(name, setting)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="found 'cuda:99', but torch sees no GPU"):
        resolve_device("cuda:99", "--device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="found 'cuda:99', but torch sees 2 GPUs"):
        resolve_device("cuda:99", "--device")


@pytest.fixture(autouse=True)
def attention_as_before():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_gpu_attends_without_plans_for_each_shape(monkeypatch: pytest.MonkeyPatch):
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
