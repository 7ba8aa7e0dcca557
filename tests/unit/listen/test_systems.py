"""The names of evaluated systems, and that the codec must be the one that encoded the data."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from higgs_tune import cli
from higgs_tune.data.codec import load_codec, weights_digest
from higgs_tune.data.dataset import EMBEDDED
from higgs_tune.listen.systems import name_systems


def test_systems_are_named_by_their_folders():
    names = [s.name for s in name_systems([Path("a/best"), Path("b c/adapter"), Path("x/best")])]
    assert names == ["base", "best", "b-c", "best-2"]


def test_no_system_is_named_reference_or_recording():
    names = [system.name for system in name_systems([Path("a/reference"), Path("b/recording")])]
    assert names == ["base", "reference-2", "recording-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Embedded speech as `data prepare` records it: with the weights of its codec."""
    folder = tmp_path_factory.mktemp("data") / "russian"
    shutil.copytree(EMBEDDED / "russian", folder)
    info = json.loads((folder / "dataset.json").read_text())
    info["codec"]["weights_sha256"] = weights_digest(load_codec("embedded"))
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def evaluate(data: Path, out: Path, *more: str) -> int:
    small = ("--num-clips", "2", "--num-generated", "1", "--max-seconds", "0.2", "--device", "cpu")
    place = ("--adapter", "none", "--data", str(data), "--out", str(out))
    return cli.main(["evaluate", *place, *small, *more])


def test_a_codec_with_the_weights_of_the_datas_codec_may_have_another_name(tmp_path, data):
    load_codec("embedded").save_pretrained(tmp_path / "renamed")
    assert evaluate(data, tmp_path / "out", "--codec", str(tmp_path / "renamed")) == 0


def test_a_codec_with_other_weights_than_the_datas_is_refused(tmp_path, data, capsys):
    other = load_codec("embedded")
    with torch.no_grad():
        other.codebooks.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    assert evaluate(data, tmp_path / "out", "--codec", str(tmp_path / "other")) == 2
    error = capsys.readouterr().err
    found, needed = weights_digest(other)[:12], weights_digest(load_codec("embedded"))[:12]
    assert f"codec {tmp_path / 'other'}: its weights are {found}…, but {data} was" in error
    assert f"was encoded with embedded, weights {needed}…" in error
    assert "Give that codec with --codec, or prepare the data again" in error
    assert not (tmp_path / "out").exists()
