"""The summary's screen of text."""

import shlex
from pathlib import Path

import pytest

from higgs_tune.report.findings import find
from higgs_tune.report.results import read_results
from higgs_tune.report.summary import WIDTH, summary_text, terminal_width
from tests.unit.report.builder import Builder, curve, realistic, sweep_config, trial_config


@pytest.mark.parametrize(
    "columns, width, num_lines", [(200, WIDTH, 32), (80, 80, 36), (10, 69, 60)]
)
def test_summary_is_one_screen(
    tmp_path: Path, monkeypatch, columns: int, width: int, num_lines: int
) -> None:
    """On a screen that is too narrow, the table of figures sets the width."""
    monkeypatch.setenv("COLUMNS", str(columns))
    realistic(tmp_path)
    results = read_results(tmp_path)
    lines = summary_text(results, find(results), terminal_width()).splitlines()
    assert len(lines) <= num_lines
    paths = ("  Report", "  Train")
    assert max(len(line) for line in lines if not line.startswith(paths)) <= width


def test_summary_names_the_program_beside_this_python(tmp_path: Path, monkeypatch) -> None:
    realistic(tmp_path / "results" / "quick")
    program = tmp_path / ".venv" / "bin" / "higgs-tune"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    results = read_results(tmp_path / "results" / "quick")

    def shown() -> str:
        return summary_text(results, find(results)).splitlines()[-1]

    assert f"{program} train --config" in shown()
    monkeypatch.chdir(tmp_path)
    command = ".venv/bin/higgs-tune train --config results/quick/best_config.yaml"
    assert shown().endswith(" " + command)
    program.unlink()
    assert shown().endswith(" higgs-tune train --config results/quick/best_config.yaml")


def test_train_command_can_be_pasted_despite_spaces_in_paths(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "my results" / "quick"
    program = tmp_path / "my tools" / "bin" / "higgs-tune"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr("sys.executable", str(program.with_name("python")))
    config = trial_config()
    builder = Builder(folder, sweep_config(confirm={"num_configs": 0})).start()
    builder.trial("t000", config, curve(config, 3.0, 0.4, 3.9, 150), origin="baseline")
    results = read_results(folder)
    command = summary_text(results, find(results)).splitlines()[-1].split("again ")[1]
    best_config = str(folder / "best_config.yaml")
    assert shlex.split(command) == [str(program), "train", "--config", best_config]


def test_a_huge_loss_keeps_the_table_aligned(tmp_path: Path) -> None:
    config = trial_config()
    builder = Builder(tmp_path, sweep_config(confirm={"num_configs": 0})).start()
    builder.trial("t000", config, curve(config, 1e6, 0.4, 3.9, 150), origin="baseline")
    results = read_results(tmp_path)
    lines = summary_text(results, find(results)).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "text nll" in line) :][:3]
    assert "1000000.00" in table[2]
    assert len({len(line) for line in table}) == 1
