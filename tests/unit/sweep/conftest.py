from pathlib import Path
from typing import Any

import pytest

from higgs_tune.config import SweepConfig
from higgs_tune.config_file import validate
from higgs_tune.sweep import study as studies


@pytest.fixture
def make_config(tmp_path: Path):
    """A small valid sweep; keyword arguments replace whole sections."""

    def make(**sections: Any) -> SweepConfig:
        raw = {
            "name": "s",
            "results_dir": str(tmp_path / "results"),
            "space": {"cross_attention": ["off", "audio_self", "text_to_audio"]},
            "tune": {"num_trials": 8},
            **sections,
        }
        return validate(SweepConfig, raw, "test")

    return make


@pytest.fixture
def study(tmp_path: Path):
    return studies.open_study("s", tmp_path, None)


@pytest.fixture
def fast_rounds(monkeypatch):
    monkeypatch.setenv("FAKE_ROUND_S", "0.001")
