"""The compiler and the cache folder that torch.compile needs."""

import os

import pytest
import torch
from torch._inductor import config

from higgs_tune.errors import ConfigError
from higgs_tune.model.compile_cache import prepare_compile

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_cache_folder(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that monkeypatch restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_missing_compiler_is_an_error_that_names_the_setting():
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"base\.compile: found true, but no C\+\+ compiler"),
    ):
        prepare_compile(CPU)


def test_cache_is_in_the_users_folder_unless_the_environment_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with config.patch({"cpp.cxx": ("true",)}):
        prepare_compile(CPU)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "higgs-tune" / "inductor")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
        prepare_compile(CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
