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

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize("num_slots", [1, 2])
def test_hyperband_halves_full_brackets_whatever_the_number_of_slots(tmp_path, num_slots):
    outcome = run(tmp_path, tune=tune(EVERY["hyperband"], slots_per_worker=num_slots))
    check_nobody_was_lost(outcome.results)
    trials = trials_of(outcome.results)
    # 6 reports, factor 3: beside the baselines, a bracket of 5 that is cut to 2 after 2 reports, and
    # the first of a bracket that is not.
    first = {f"t{n:03d}" for n in range(2, 7)}
    at_rung = sorted(values_at(trials, 50)[name] for name in first)
    for name, trial in trials.items():
        survives = name not in first or values_at(trials, 50)[name] <= at_rung[1]
        assert trial["status"]["status"] == ("completed" if survives else "pruned")
        assert trial["status"]["step"] == (150 if survives else 50)
        expected = uninterrupted(config_of(trial), trial["status"]["step"])
        assert trained(outcome.results, name) == expected
        told = studies.latest(study_of(outcome))[int(name[1:])]
        assert told.state == (TrialState.COMPLETE if survives else TrialState.PRUNED)
        assert told.intermediate_values == {
            line["step"]: line["val/text/nll"] for line in trial["metrics"]
        }
    assert len(study_of(outcome).trials) == 8  # a paused trial was neither told nor lost


def test_the_median_rule_stops_after_the_grace(tmp_path):
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
