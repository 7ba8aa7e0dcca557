"""How the report shows an evaluation that lies in the sweep's folder."""

import hashlib
import json
from pathlib import Path

import pytest

from higgs_tune.errors import SweepError
from higgs_tune.report.build import build_report
from tests.unit.report.builder import realistic

STALE = "Another configuration has become the best"


def systems(fingerprint: str) -> dict:
    mean = {"mean": 0.875, "num_clips": 8}
    return {
        "systems": [
            {"name": "base", "adapter_sha256": None, "speech": {}},
            {"name": "b", "adapter_sha256": fingerprint, "speech": {"speech/eos_rate": mean}},
        ]
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    realistic(tmp_path)
    build_report(tmp_path)
    (tmp_path / "listen").mkdir()
    return tmp_path


def shown(folder: Path, content: object) -> str:
    (folder / "listen" / "evaluate.json").write_text(json.dumps(content))
    build_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_of_the_best_adapter_is_linked_with_its_figures(folder: Path) -> None:
    before = (folder / "report.html").read_text(encoding="utf-8")
    weights = (folder / "best_adapter" / "adapter_model.safetensors").read_bytes()
    page = shown(folder, systems(hashlib.sha256(weights).hexdigest()))
    assert '<a href="listen/evaluate.html">' in page and '<a href="listen' not in before
    assert "0.88 <small>8 clips</small>" in page
    assert STALE not in page


def test_an_evaluation_of_another_adapter_is_called_that(folder: Path) -> None:
    assert STALE in shown(folder, systems("0" * 64))


@pytest.mark.parametrize("content", [{}, {"systems": [{"name": "base"}]}, [1]])
def test_a_damaged_evaluation_is_one_clear_error(folder: Path, content: object) -> None:
    with pytest.raises(SweepError, match=r"listen/evaluate.json: cannot be read"):
        shown(folder, content)
