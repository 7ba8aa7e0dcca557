"""Reading a sweep's folder, whatever state it is in."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from higgs_tune import metrics as m
from higgs_tune.errors import DataError, SweepError
from higgs_tune.report.results import UNFINISHED, read_results, write_table
from tests.unit.report.builder import Builder, curve, realistic, report_row, trial_config

CONFIG = trial_config()
ROWS = curve(CONFIG, 3.0, 0.1, 3.9, 150)


def test_folder_without_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"no sweep\.yaml"):
        read_results(tmp_path)


def test_sweep_without_trials_or_base_is_readable(tmp_path: Path) -> None:
    Builder(tmp_path, base=None).start()
    results = read_results(tmp_path)
    assert results.trials == ()
    assert results.base is None
    assert results.audio_limit is None


def test_trial_without_status_is_unfinished(tmp_path: Path) -> None:
    Builder(tmp_path).start().trial("t000", CONFIG, ROWS[:2], status=None)
    (trial,) = read_results(tmp_path).trials
    assert trial.status == UNFINISHED
    assert trial.step == 50
    assert not trial.full_budget


def test_line_cut_off_by_a_kill_is_ignored(tmp_path: Path) -> None:
    folder = Builder(tmp_path).start().trial("t000", CONFIG, ROWS[:2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 75, "val/te')
    (trial,) = read_results(tmp_path).trials
    assert trial.step == 50


def test_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    folder = Builder(tmp_path).start().trial("t000", CONFIG, ROWS[:1])
    path = folder / "metrics.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: not JSON"):
        read_results(tmp_path)


def test_damaged_config_names_the_file(tmp_path: Path) -> None:
    folder = Builder(tmp_path).start().trial("t000", CONFIG, ROWS)
    (folder / "config.json").write_text("{")
    with pytest.raises(SweepError, match=r"t000/config\.json: cannot be read"):
        read_results(tmp_path)


def test_repeated_step_of_a_resumed_trial_counts_once(tmp_path: Path) -> None:
    rows = [report_row(25, 5.0, 0, 4.0), report_row(50, 4.0, 0, 4.0), report_row(25, 4.9, 0, 4.0)]
    Builder(tmp_path).start().trial("t000", CONFIG, rows)
    (trial,) = read_results(tmp_path).trials
    assert trial.curve(m.VAL_TEXT_NLL) == [(25, 4.9), (50, 4.0)]


def test_nan_counts_as_missing(tmp_path: Path) -> None:
    rows = [report_row(25, 5.0, 0, 4.0), report_row(50, math.nan, 0, 4.0)]
    Builder(tmp_path).start().trial("t000", CONFIG, rows, status="diverged")
    (trial,) = read_results(tmp_path).trials
    assert trial.last(m.VAL_TEXT_NLL) is None
    assert trial.curve(m.VAL_TEXT_NLL) == [(25, 5.0)]


def test_completed_trial_that_ends_with_nan_is_not_a_full_run(tmp_path: Path) -> None:
    rows = [*ROWS[:-1], report_row(150, math.nan, 0, 4.0)]
    Builder(tmp_path).start().trial("t000", CONFIG, rows)
    assert not read_results(tmp_path).trials[0].full_budget


def test_feasible_means_audio_loss_within_tolerance_of_the_base(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    limit = 3.93 * 1.05
    builder.trial("t000", CONFIG, [*ROWS[:-1], report_row(150, 3.0, 0, limit - 1e-6)])
    builder.trial("t001", CONFIG, [*ROWS[:-1], report_row(150, 3.0, 0, limit + 1e-6)])
    builder.trial("t002", CONFIG, [])
    results = read_results(tmp_path)
    assert [results.feasible(trial) for trial in results.trials] == [True, False, None]


def test_table_has_one_row_per_trial_with_settings_and_metrics(tmp_path: Path) -> None:
    realistic(tmp_path / "quick")
    results = read_results(tmp_path / "quick")
    write_table(results, tmp_path / "trials.parquet")
    table = pq.read_table(tmp_path / "trials.parquet")
    assert table.num_rows == 26
    first = table.slice(0, 1).to_pylist()[0]
    assert first["id"] == "t000"
    assert first["targets"] == "attention,text_mlp,audio_mlp"
    assert first["rank"] == 16
    assert first[m.VAL_TEXT_NLL] == results.trials[0].last(m.VAL_TEXT_NLL)


def test_table_of_an_empty_sweep_has_no_rows(tmp_path: Path) -> None:
    Builder(tmp_path).start()
    write_table(read_results(tmp_path), tmp_path / "trials.parquet")
    assert pq.read_table(tmp_path / "trials.parquet").num_rows == 0


def test_missing_key_is_named(tmp_path: Path) -> None:
    folder = Builder(tmp_path).start().trial("t000", CONFIG, ROWS)
    content = json.loads((folder / "config.json").read_text())
    del content["origin"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(SweepError, match="lacks 'origin'"):
        read_results(tmp_path)
