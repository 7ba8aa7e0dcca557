"""Whole sweeps that HyperBand or the median rule cut short."""

import pytest
from optuna.trial import TrialState

from higgs_tune.sweep import study as studies
from tests.integration.test_schedulers import (
    EVERY,
    check_nobody_was_lost,
    config_of,
    trained,
    tune,
    uninterrupted,
    values_at,
)
from tests.integration.test_sweep import run, study_of, trials_of

TWO = {"slots_per_worker": 2, "cpus_per_worker": 1}
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize("workers", [{}, {"slots_per_worker": 2}, {"num_workers": 2, **TWO}])
def test_hyperband_cuts_every_bracket_for_any_number_of_slots(tmp_path, workers):
    settings = {"slots_per_worker": 1, **workers}
    outcome = run(tmp_path, tune=tune(EVERY["hyperband"], num_trials=18, **settings))
    check_nobody_was_lost(outcome.results, 18)
    trials = trials_of(outcome.results)
    # 6 reports, factor 3: apart from the baselines, brackets of 5 that are cut to 2 after 2 reports
    # alternate with brackets of 3 that are never cut.
    expected = {f"t{n:03d}": 150 for n in range(18)}
    for first in (2, 10):
        bracket = [f"t{n:03d}" for n in range(first, first + 5)]
        ranked = sorted(bracket, key=values_at(trials, 50).__getitem__)
        expected |= dict.fromkeys(ranked[2:], 50)
    for name, trial in trials.items():
        survives = expected[name] == 150
        assert trial["status"]["status"] == ("completed" if survives else "pruned")
        assert trial["status"]["step"] == expected[name]
        done = uninterrupted(config_of(trial), expected[name])
        assert trained(outcome.results, name) == done
        told = studies.latest(study_of(outcome))[int(name[1:])]
        assert told.state == (TrialState.COMPLETE if survives else TrialState.PRUNED)
        assert told.intermediate_values == {
            line["step"]: line["val/text/nll"] for line in trial["metrics"]
        }
    assert len(study_of(outcome).trials) == 18  # no paused trial got a second entry or was lost


def test_the_median_rule_stops_trials_after_the_grace_period(tmp_path):
    median = {"name": "median", "min_samples": 2}
    outcome = run(tmp_path, tune=tune(median, num_trials=10, slots_per_worker=1))
    check_nobody_was_lost(outcome.results, 10)
    trials = trials_of(outcome.results)
    ended = {name: trial["status"] for name, trial in trials.items()}
    pruned = [name for name, status in ended.items() if status["status"] == "pruned"]
    assert pruned
    assert all(ended[name]["step"] >= 50 for name in pruned)
    best = min(values_at(trials, 50), key=values_at(trials, 50).__getitem__)
    assert ended[best]["status"] == "completed"
