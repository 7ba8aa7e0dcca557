"""The report's files are complete, can be read back, and need neither a network nor torch."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from higgs_tune.config import TrialConfig
from higgs_tune.report.build import build_report
from higgs_tune.report.findings import find
from higgs_tune.report.html import render_html
from higgs_tune.report.results import read_results
from higgs_tune.report.summary import Summary
from higgs_tune.train.train_cli import add_arguments, read_settings
from tests.unit.report.builder import Builder, curve, realistic, sweep_config, trial_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """A finished sweep with its report, made in a narrow terminal; read only."""
    folder = tmp_path_factory.mktemp("quick")
    realistic(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "60")
        return folder, build_report(folder)


def test_finished_sweep_gives_every_file(finished: tuple[Path, Summary]) -> None:
    folder, summary = finished
    for name in (
        "trials.parquet",
        "summary.json",
        "summary.txt",
        "report.html",
        "best_config.yaml",
    ):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "plots").glob("*.png"))) == 5
    assert not list(folder.rglob("*.tmp"))
    stored = (folder / "summary.txt").read_text()
    assert stored.split() == summary.text.split()
    assert stored.count("\n") < summary.text.count("\n"), "it is as wide as that terminal"
    assert json.loads((folder / "summary.json").read_text())["best"]["trial_id"] == summary.best_id


def test_report_states_how_many_clips_the_losses_are_measured_on(tmp_path: Path) -> None:
    said = "Losses are measured on 48 held-out clips"
    realistic(tmp_path)
    summary = build_report(tmp_path)
    assert said in " ".join(summary.text.split())
    assert said in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["num_val_clips"] == 48
    base = json.loads((tmp_path / "base.json").read_text())
    del base["num_val_clips"]  # as in an older sweep
    (tmp_path / "base.json").write_text(json.dumps(base))
    assert "held-out clips," not in build_report(tmp_path).text


def test_page_shows_every_learning_rate_of_a_pbt_copy(tmp_path: Path) -> None:
    change = {
        "step": 50, "learning_rate": 3e-3, "new_module_lr_factor": 0.1, "text_loss_weight": 1.0,
        "audio_loss_weight": 1.0, "copied_from": "t003",
    }  # fmt: skip
    config = TrialConfig.model_validate({**trial_config().model_dump(), "schedule": (change,)})
    builder = Builder(tmp_path).start()
    builder.trial("t002", config, curve(config, 2.0, 0.4, 3.9, 150))
    build_report(tmp_path)
    assert ">1.0e-04 → 3.0e-03<" in (tmp_path / "report.html").read_text()


def test_page_and_best_config_say_what_figures_are_based_on(finished: tuple[Path, Summary]) -> None:
    folder, summary = finished
    assert (
        "These show the search, in which each configuration ran once"
        in (folder / "report.html").read_text()
    )
    header = (folder / "best_config.yaml").read_text().splitlines()[1]
    assert header.endswith(f"sweep quick. {summary.facts['answers']['found']['figure']}.")


def test_table_by_setting_has_every_setting_with_listed_values(tmp_path: Path) -> None:
    space = {
        "alpha": [16.0, 32.0],
        "batch_clips": [4, 8],
        "dropout": [0.0, 0.1],
        "text_loss_weight": {"low": 0.5, "high": 2.0},
    }
    builder = Builder(tmp_path, sweep_config(space=space)).start()
    for number in range(2, 6):
        even = number % 2 == 0
        config = trial_config(
            alpha=16.0 if even else 32.0,
            batch_clips=4 if even else 8,
            dropout=0.0 if even else 0.1,
            text_loss_weight=number / 3,
        )
        builder.trial(f"t{number:03d}", config, curve(config, 2.0 + number, 0.1, 3.9, 150))
    results = read_results(tmp_path)
    page = render_html(results, find(results), {}, None, None)
    table = page[page.index("By setting") : page.index("All trials")]
    assert re.findall(r"<th scope='row'>(\w+)</th>", table) == ["alpha", "dropout", "batch_clips"]


def test_best_config_holds_all_that_training_it_again_needs(finished: tuple[Path, Summary]) -> None:
    folder, summary = finished
    content = yaml.safe_load((folder / "best_config.yaml").read_text())
    assert set(content) == {
        "higgs_tune", "base", "data", "trial", "run", "lora_config", "results", "command",
    }  # fmt: skip
    results = read_results(folder)
    best = next(trial for trial in results.trials if trial.id == summary.best_id)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--config", str(folder / "best_config.yaml")])
    read = read_settings(arguments)[0]["trial"]
    assert read.model_copy(update={"seed": 0}) == best.config
    assert read.seed in content["results"]["seeds"]
    assert content["higgs_tune"]["version"] == "0.1.0"
    assert content["lora_config"]["r"] == best.config.rank
    assert content["data"]["content_hash"] == "c0ffee"
    assert content["results"]["val"]["val/text/nll"]["n"] == 2
    assert content["results"]["paired_difference_to_baseline"]["mean"] < 0
    assert content["command"] == "higgs-tune train --config best_config.yaml"


def test_exported_adapter_is_of_the_run_with_the_lowest_loss(
    finished: tuple[Path, Summary],
) -> None:
    folder, _ = finished
    content = yaml.safe_load((folder / "best_config.yaml").read_text())
    losses = {
        run.id: run.last("val/text/nll")
        for run in read_results(folder).trials
        if run.id in content["results"]["runs"]
    }
    adapter = (folder / "best_adapter" / "adapter_model.safetensors").read_bytes().decode()
    assert losses[adapter] == min(losses.values())
    assert not list((folder / "best_adapter").glob("training_state*"))


def test_a_report_that_another_one_overtakes_still_exports_the_adapter(
    finished: tuple[Path, Summary], tmp_path: Path, monkeypatch
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "quick"))
    target, rename, others = folder / "best_adapter", Path.rename, [b"first", b"second"]
    weights = (target / "adapter_model.safetensors").read_bytes()

    def overtaken(self: Path, to: Path) -> Path:
        if to == target and others:  # another report has just put its adapter there
            target.mkdir(exist_ok=True)
            (target / "adapter_model.safetensors").write_bytes(others.pop())
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", overtaken)
    build_report(folder)
    assert (target / "adapter_model.safetensors").read_bytes() == weights
    assert not others and not list(folder.glob(".best_adapter*"))


def content(folder: Path) -> dict[Path, bytes]:
    """The content of all files, with the folder's own path replaced by a dot."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    here = str(folder).encode()
    return {path.relative_to(folder): path.read_bytes().replace(here, b".") for path in files}


def test_rebuilt_report_is_identical(finished: tuple[Path, Summary], tmp_path: Path) -> None:
    again = shutil.copytree(finished[0], tmp_path / finished[0].name)
    build_report(again)
    assert content(again) == content(finished[0])


def test_stale_best_is_removed_when_nothing_can_be_chosen(
    finished: tuple[Path, Summary], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    base = json.loads((tmp_path / "base.json").read_text())
    base["metrics"]["val/audio/nll_per_code"] = 1.0  # every trial is now beyond the limit
    (tmp_path / "base.json").write_text(json.dumps(base))
    summary = build_report(tmp_path)
    assert summary.facts["outcome"] == "no_feasible"
    assert summary.best_id is None
    assert not (tmp_path / "best_config.yaml").exists()
    assert not (tmp_path / "best_adapter").exists()


def test_missing_adapter_is_noted_and_best_config_is_still_written(tmp_path: Path) -> None:
    config = trial_config()
    builder = Builder(tmp_path).start()
    builder.trial("t000", config, curve(config, 2.0, 0.4, 3.9, 150), adapter=False)
    summary = build_report(tmp_path)
    assert "t000 left no adapter" in summary.text
    assert yaml.safe_load((tmp_path / "best_config.yaml").read_text())["lora_config"] is None


def test_best_adapter_outlives_the_trials_checkpoints(
    finished: tuple[Path, Summary], tmp_path: Path
) -> None:
    """Checkpoints of a large sweep take hundreds of GiB, so users delete them afterwards."""
    folder = Path(shutil.copytree(finished[0], tmp_path / "quick"))
    for adapter in folder.glob("trials/*/adapter"):
        shutil.rmtree(adapter)
    assert "left no adapter" not in build_report(folder).text
    kept = {path for path in content(folder) if path.parts[0].startswith("best_")}
    assert kept == {path for path in content(finished[0]) if path.parts[0].startswith("best_")}
    assert all((folder / path).read_bytes() == (finished[0] / path).read_bytes() for path in kept)
    best_config = folder / "best_config.yaml"
    best_config.write_text(re.sub(r"\bseed: \d+", "seed: 7", best_config.read_text()))
    assert "left no adapter" in build_report(folder).text  # what is there is another run's
    assert not (folder / "best_adapter").exists()


@pytest.mark.parametrize("base", [None, {"val/text/nll": 7.7, "val/audio/nll_per_code": 3.9}])
def test_empty_sweep_gives_a_report(tmp_path: Path, base: dict[str, float] | None) -> None:
    Builder(tmp_path, base=base).start()
    summary = build_report(tmp_path)
    assert summary.facts["outcome"] == "no_trials"
    assert "No trial has reported a result yet" in summary.report_path.read_text()


def test_page_needs_no_network_and_has_no_placeholder_left(finished: tuple[Path, Summary]) -> None:
    page = finished[1].report_path.read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "<link" not in page
    assert not re.search(r"<!--\w+-->", page)
    assert page.count("<svg") == 5


def test_page_escapes_a_trials_reason(tmp_path: Path) -> None:
    config = trial_config()
    builder = Builder(tmp_path).start()
    rows = curve(config, 2.0, 0.4, 3.9, 50)
    builder.trial("t000", config, rows, status="failed", reason='<script>alert("x")</script>')
    page = build_report(tmp_path).report_path.read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, higgs_tune.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
