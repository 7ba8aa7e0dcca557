"""How the report shows an evaluation that it finds in the sweep's folder."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from higgs_tune.errors import SweepError
from higgs_tune.report.build import build_report
from higgs_tune.report.listening import read_listening
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


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep with its report; read only."""
    folder = tmp_path_factory.mktemp("reported") / "quick"
    folder.mkdir()
    realistic(folder)
    build_report(folder)
    return folder


@pytest.fixture
def folder(reported: Path, tmp_path: Path) -> Path:
    """A copy of that sweep with an empty folder for its evaluation."""
    copy = shutil.copytree(reported, tmp_path / "quick")
    (copy / "listen").mkdir()
    return copy


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


def test_an_evaluation_of_another_adapter_is_marked_stale(folder: Path) -> None:
    assert STALE in shown(folder, systems("0" * 64))


@pytest.mark.parametrize("content", [{}, {"systems": [{"name": "base"}]}, [1]])
def test_a_damaged_evaluation_is_one_clear_error(tmp_path: Path, content: object) -> None:
    (tmp_path / "listen").mkdir()
    (tmp_path / "listen" / "evaluate.json").write_text(json.dumps(content))
    with pytest.raises(SweepError, match=r"listen/evaluate.json: cannot be read"):
        read_listening(tmp_path)
