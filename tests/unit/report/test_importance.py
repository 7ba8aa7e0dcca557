"""Which setting mattered: its share, and how each of its values did."""

from pathlib import Path

import pytest

from higgs_tune.report.importance import levels
from higgs_tune.report.results import read_results
from tests.unit.report.builder import Builder, curve, trial_config


def test_median_of_an_even_number_lies_between_the_middle_two(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    for number in range(12):
        config = trial_config()
        builder.trial(f"t{number:03d}", config, curve(config, 2.0 + number, 0.1, 3.9, 150))
    (level,) = levels(read_results(tmp_path), "target_set")
    assert (level.num_trials, level.best) == (12, pytest.approx(2.0))
    assert level.median == pytest.approx(7.5)
