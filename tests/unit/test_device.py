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


def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch):
    for found, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: int(found))
        assert resolve_device("auto", "base.device").type == device
