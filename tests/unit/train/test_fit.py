"""`higgs-tune fit`, and the real model's sweep that it was made for."""

import json
from pathlib import Path

import pytest

from higgs_tune import cli
from higgs_tune.config import BaseSettings
from higgs_tune.config_file import load_sweep
from higgs_tune.config_space import highest
from higgs_tune.config_steps import grace_steps
from higgs_tune.model.load import load_base
from higgs_tune.train.checkpoint import save_adapter
from higgs_tune.train.engine import Engine
from higgs_tune.train.fit_cli import fit
from higgs_tune.train.memory import largest_trial
from higgs_tune.train.sweep_pack import sweep_limits
from tests.checkpoints import write_boson, write_native
from tests.models import tiny_base

SWEEPS = Path(__file__).parents[3] / "sweeps"
REAL = SWEEPS / "higgs_v2.yaml"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_the_real_sweep_is_valid_and_stops_no_trial_in_its_warm_up() -> None:
    config = load_sweep(REAL)
    train = config.train
    assert grace_steps(config) == 300
    assert 300 >= train.num_steps / 3 > highest(config.space.warmup_fraction) * train.num_steps
    assert set(config.space.cross_attention) == {"off", "audio_self", "text_to_audio"}
    assert max(config.space.batch_clips) <= 16
    assert config.base.dtype == "bfloat16"


def test_every_shipped_sweep_is_in_the_wheel() -> None:
    project = (SWEEPS.parent / "pyproject.toml").read_text()
    for path in SWEEPS.glob("*.yaml"):
        assert f'"sweeps/{path.name}" = "higgs_tune/sweeps/{path.name}"' in project


def test_the_real_sweep_asks_for_a_revision_before_anything_is_downloaded(capsys) -> None:
    from higgs_tune.errors import ConfigError
    from higgs_tune.model.load import load_base

    with pytest.raises(
        ConfigError, match=r"base\.revision: not set for Hub id bosonai/higgs-audio"
    ):
        load_base(load_sweep(REAL).base.model_copy(update={"device": "cpu"}))


def test_the_command_prints_parts_that_add_up(capsys) -> None:
    words = ["fit", "--config", str(SWEEPS / "quick.yaml"), "--clip-rows", "100"]
    words += ["--set", "space.cross_attention=[audio_self]"]
    assert cli.main([*words, "--gpu-gib", "24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["slots"].keys() == {"1", "4"}
    for parts in found["slots"].values():
        total = parts.pop("total")
        assert total == sum(parts.values())
        assert all(value >= 0 for value in parts.values())
    assert found["slots"]["4"]["base"] == found["slots"]["1"]["base"]
    assert found["slots"]["4"]["adapters"] == pytest.approx(4 * found["slots"]["1"]["adapters"])
    assert found["slots_that_fit"] > 4
    assert found["checkpoints_kept"] == 12 + 2 * 2  # trial 0 and the best, two seeds each
    population = ["--set", "tune.scheduler={name: pbt}"]  # compared at every report
    assert cli.main([*words, *population, "--gpu-gib", "24", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoints_kept"] == 12 * 3 + 2 * 2
    assert cli.main([*words, "--gpu-gib", "0.2"]) == 0
    table = capsys.readouterr().out
    assert "total" in table and "tune.slots_per_worker is 4: too many" in table


@pytest.mark.parametrize("how", [(), ("--json",)])
def test_a_sweep_too_large_for_one_slot_prints_figures_and_an_error(how, capsys) -> None:
    quick = str(SWEEPS / "quick.yaml")
    words = ["fit", "--config", quick, "--clip-rows", "100", "--gpu-gib", "0.05", *how]
    assert cli.main(words) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert "total" in printed.out and "too many" not in printed.out
    assert f"error: {quick}: one slot takes 0.0" in printed.err
    assert "does not fit into 0.05 GiB, of which 5% are kept free. Lower" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "base.path=someone/other"], "base.revision: not set for Hub id someone/other"),
        (["--set", "base.path=./nowhere"], "base.path: ./nowhere does not exist"),
        (
            ["--base-config", "nowhere.json"],
            "nowhere.json: not a readable JSON file",
        ),
        (["--clip-rows", "1"], "--clip-rows must be at least 8"),
    ],
)
def test_bad_input_is_refused_with_its_reason(words, message, capsys) -> None:
    assert cli.main(["fit", "--config", str(SWEEPS / "quick.yaml"), *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_as_large_as_predicted(tmp_path) -> None:
    config = load_sweep(SWEEPS / "quick.yaml", ["space.cross_attention=[off]"])
    base = load_base(BaseSettings(device="cpu"))
    limits = sweep_limits(config, num_slots=1)
    engine = Engine(base, limits)
    trial = largest_trial(limits, "audio_self")  # the second baseline, in every sweep
    engine.add("a", trial)
    save_adapter(tmp_path, engine.state("a"), trial, base.source)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    predicted = fit(config, None, 80.0, 100)["checkpoint"]
    assert predicted <= written <= 1.02 * predicted  # names and settings


def test_a_24_gib_gpu_holds_the_real_sweep_without_new_modules() -> None:
    """The command of docs/howto/higgs_v2.md."""
    settings = [
        "space.cross_attention=off",
        "baseline.with_audio_self=false",
        "space.rank=[8, 16]",
        "train.token_budget=2048",
    ]
    assert fit(load_sweep(REAL, settings), None, 24.0, 400)["slots_that_fit"] == 1
    assert (
        fit(load_sweep(REAL, [settings[0], *settings[2:]]), None, 24.0, 400)["slots_that_fit"] == 0
    )


def test_a_config_of_another_model_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = ["fit", "--config", str(REAL), "--set", f"base.path={tmp_path}"]
    assert cli.main(words) == cli.BAD_INPUT
    assert "model_type is 'llama'" in capsys.readouterr().err


def test_a_config_with_impossible_sizes_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "higgs_audio_v2", "hidden_size": 100}')
    assert cli.main(["fit", "--config", str(REAL), "--base-config", str(path)]) == cli.BAD_INPUT
    assert f"{path}: " in (message := capsys.readouterr().err) and "not a multiple" in message


def test_a_folder_in_the_original_format_is_predicted_like_its_native_twin(tmp_path) -> None:
    write_boson(tmp_path / "boson", audio_self=False)
    native = load_base(BaseSettings(path=str(tmp_path / "boson"), device="cpu")).model.config
    (tmp_path / "config.json").write_text(native.to_json_string())
    config = load_sweep(SWEEPS / "quick.yaml", [f"base.path={tmp_path / 'boson'}"])
    assert fit(config, None, 2.0, 100) == fit(config, tmp_path / "config.json", 2.0, 100)


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """Where the cache of the Hub holds owner/name; nothing is there yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name" / "snapshots" / REVISION
    folder.parent.mkdir(parents=True)
    return folder


NAMED = ["base.path=owner/name", f"base.revision={REVISION}"]


@pytest.mark.parametrize("original", [True, False])
def test_a_hub_id_is_predicted_like_its_folder(snapshot, original) -> None:
    if original:
        write_boson(snapshot, audio_self=False)
    else:
        write_native(snapshot, tiny_base().model)
    named, here = (
        load_sweep(SWEEPS / "quick.yaml", words) for words in (NAMED, [f"base.path={snapshot}"])
    )
    assert fit(named, None, 2.0, 100) == fit(here, None, 2.0, 100)


def test_a_hub_id_of_another_model_is_refused(snapshot, capsys) -> None:
    snapshot.mkdir()
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    words = [word for name in NAMED for word in ("--set", name)]
    assert cli.main(["fit", "--config", str(REAL), *words]) == cli.BAD_INPUT
    assert "model_type is 'llama'" in capsys.readouterr().err
