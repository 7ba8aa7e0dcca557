"""`generate` and `evaluate` use the base that the adapters name, unless another is given."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from higgs_tune import cli
from higgs_tune.base_source import EMBEDDED_BASE
from higgs_tune.config import BaseSettings
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.listen.bases import base_for, system_text_for
from higgs_tune.train.checkpoint import save_adapter


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> Path:
    """A base that differs from the embedded one and has no text head."""
    folder = tmp_path_factory.mktemp("bases") / "headless"
    shutil.copytree(EMBEDDED_BASE, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["text_lm_head.weight"]
    weights["audio_lm_head.weight"] = weights["audio_lm_head.weight"].roll(1, dims=1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def adapter_of(tmp_path, state, adapter_config):
    """Writes an adapter that names a base."""

    def write(base: object, name: str = "adapter", revision: str | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_adapter(folder, state, adapter_config, str(base), revision)
        return folder

    return write


def generate(out: Path, *more: str) -> int:
    options = ["--device", "cpu", "--max-seconds", "0.4", "--temperature", "0"]
    return cli.main(["generate", "--text", "da", "--out", str(out), *options, *more])


def evaluate(out: Path, *more: str) -> int:
    small = ("--num-clips", "2", "--num-generated", "1", "--max-seconds", "0.2", "--device", "cpu")
    return cli.main(["evaluate", "--data", "embedded:russian", "--out", str(out), *small, *more])


def test_generate_uses_the_base_that_the_adapter_names(tmp_path, headless, adapter_of):
    adapter = ("--adapter", str(adapter_of(headless)))
    assert generate(tmp_path / "named.wav", *adapter) == 0
    assert generate(tmp_path / "same.wav", *adapter, "--base", str(headless)) == 0
    assert generate(tmp_path / "other.wav", *adapter, "--base", "embedded") == 0
    named, same, other = (
        (tmp_path / f"{name}.wav").read_bytes() for name in ("named", "same", "other")
    )
    assert named == same != other
    assert json.loads((tmp_path / "named.json").read_text())["base"] == str(headless)
    assert json.loads((tmp_path / "other.json").read_text())["base"] == str(EMBEDDED_BASE)


def test_evaluate_uses_the_base_that_the_adapter_names(tmp_path, headless, adapter_of):
    adapter = str(adapter_of(headless))
    assert evaluate(tmp_path / "out", "--adapter", "none", "--adapter", adapter) == 0
    base = json.loads((tmp_path / "out" / "evaluate.json").read_text())["base"]
    assert (base["path"], base["text_head"]) == (str(headless), "from_embedding")


def test_path_of_another_machines_embedded_base_means_the_local_one(adapter_of):
    adapter = adapter_of("/elsewhere/lib/higgs_tune/embedded/base")
    assert base_for([adapter], {}, "generate").path == "embedded"
    with pytest.raises(ModelError, match="the base that it names is not on this machine"):
        base_for([adapter_of("/elsewhere/base", "other")], {}, "generate")


def test_two_names_of_the_embedded_base_are_the_same_base(tmp_path, adapter_of):
    first, second = adapter_of("embedded", "first"), adapter_of(EMBEDDED_BASE, "second")
    assert base_for([first, second], {}, "evaluate").path == "embedded"


def test_adapters_of_different_bases_are_refused(tmp_path, headless, adapter_of, capsys):
    first, second = adapter_of(headless, "first"), adapter_of("embedded", "second")
    both = ("--adapter", str(first), "--adapter", str(second))
    assert evaluate(tmp_path / "out", *both) == 2
    error = capsys.readouterr().err
    assert f"different bases ({first}: {headless}; {second}: {EMBEDDED_BASE})" in error
    assert base_for([first, second], {"path": str(headless)}, "evaluate").path == str(headless)
    pinned = [adapter_of("owner/name", f"pinned-{n}", revision=f"commit{n}") for n in (1, 2)]
    with pytest.raises(ConfigError, match=r"owner/name at commit1; .* owner/name at commit2"):
        base_for(pinned, {}, "evaluate")


def test_given_settings_override_what_the_adapter_names(adapter_of):
    adapter = adapter_of("owner/name", revision="0123abc")
    found = base_for([adapter], {"dtype": "bfloat16", "text_head": "checkpoint"}, "generate")
    assert (found.path, found.revision) == ("owner/name", "0123abc")
    assert (found.dtype, found.text_head) == ("bfloat16", "checkpoint")
    assert base_for([adapter], {"revision": "later"}, "generate").revision == "later"
    assert base_for([adapter], {"path": "embedded"}, "generate").revision is None


def test_missing_base_is_an_error_unless_another_is_given(tmp_path, adapter_of):
    adapter = adapter_of(tmp_path / "gone")
    with pytest.raises(
        ModelError, match=r"adapter: the base .* is not on this machine: .*gone.* with --base"
    ):
        base_for([adapter], {}, "generate")
    assert base_for([adapter], {"path": "embedded"}, "generate").path == "embedded"


def test_without_an_adapter_the_base_is_embedded_and_settings_are_checked():
    assert base_for([], {}, "generate").path == "embedded"
    with pytest.raises(ConfigError, match="generate:\n  text_head: Input should be 'checkpoint'"):
        base_for([], {"text_head": "none"}, "generate")


@pytest.mark.parametrize("command", ["generate", "check"])
def test_a_base_without_text_head_needs_text_head_from_embedding(
    tmp_path, headless, capsys, command: str
):
    def run(*more: str) -> int:
        if command == "generate":
            return generate(tmp_path / "a.wav", "--base", str(headless), *more)
        return cli.main(["check", "--data", "embedded:russian", "--base", str(headless), *more])

    assert run() == 2
    assert "set base.text_head (--text-head) to from_embedding" in capsys.readouterr().err
    assert run("--text-head", "some") == 2
    assert "text_head: Input should be 'checkpoint' or 'from_embedding'" in capsys.readouterr().err
    assert run("--text-head", "from_embedding") == 0


def test_a_merged_checkpoint_keeps_the_system_text_of_its_adapter(tmp_path, state, adapter_config):
    adapter, merged = tmp_path / "told", tmp_path / "merged"
    adapter.mkdir()
    save_adapter(adapter, state, adapter_config, "embedded", system_text="Speak.")
    assert cli.main(["export", str(adapter), "--out", str(merged), "--merge"]) == 0
    base = ("--base", str(merged))
    assert generate(tmp_path / "merged.wav", *base) == 0
    assert generate(tmp_path / "given.wav", *base, "--system-text", "") == 0
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in ("merged", "given")]
    assert [one["system_text"] for one in found] == ["Speak.", None]
    assert system_text_for([], None, BaseSettings(path=str(merged))) == "Speak."  # for `evaluate`
