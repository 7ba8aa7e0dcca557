"""What the sampler learns from trials, and from which trial on it uses its model."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from higgs_tune.metrics import BROKEN
from higgs_tune.sweep import study as studies
from tests.sweep_fakes import AUDIO_LIMIT, finish, make_searcher, report


def test_a_loss_that_is_not_finite_never_reaches_the_study(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_result("a", report(5.0, 25))
    searcher.on_trial_complete("a", report(math.nan, 50, "diverged", reason="NaN at step 50"))
    assert study.trials[0].intermediate_values == {25: 5.0}


def test_a_pruned_trials_audio_loss_is_recorded_as_a_constraint(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_complete("a", report(5.0, 25, audio=AUDIO_LIMIT + 0.5))
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.constraints["val/audio/nll_per_code"] == pytest.approx(0.5)


@pytest.mark.parametrize("status", BROKEN)
def test_a_broken_trial_is_infeasible_by_a_separate_constraint(study, make_config, status):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_complete("a", {"step": 50, "status": status, "reason": "it says why"})
    (trial,) = study.trials
    assert (trial.state, trial.value) == (TrialState.PRUNED, None)
    assert trial.constraints == {"broke": 1.0}
    assert trial.user_attrs["reason"] == "it says why"
    assert not studies.feasible(trial) and studies.best_records(study, 5) == []


def test_a_cancelled_trial_fails_and_has_no_constraints(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_result("a", report(5.0, 25))
    searcher.cancel_live("the sweep was interrupted")
    (trial,) = study.trials
    assert (trial.state, trial.constraints) == (TrialState.FAIL, {})


def test_the_sampler_avoids_rates_at_which_trials_diverge(study, make_config):
    """The best rate is just below those at which all trials diverge: the upper half of the range."""
    config = make_config(tune={"num_trials": 42})
    searcher, _, _ = make_searcher(study, config)
    rates = config.space.learning_rate
    limit = math.sqrt(rates.low * rates.high)
    diverged = []
    for index in range(config.tune.num_trials):
        rate = searcher.suggest(str(index))["trial"]["learning_rate"]
        diverged.append(rate > limit)
        if diverged[-1]:
            searcher.on_trial_complete(str(index), {"step": 25, "status": "diverged"})
        else:
            finish(searcher, str(index), 2.0 + math.log10(limit / rate))
    assert sum(diverged[2:12]) >= 3, "rates that diverge were tried"
    assert sum(diverged[12:]) < 15, (
        "at random, half of the 30 would diverge; 25 or more if divergence were ignored"
    )


def test_a_baseline_outside_the_space_does_not_affect_the_sampler(tmp_path, make_config):
    """If it counted and was the best, the sampler would have no good trial to learn from."""
    config = make_config(baseline={"rank": 64}, tune={"num_trials": 24})
    runs = []
    for loss in (0.1, 9.0):
        folder = tmp_path / str(loss)
        folder.mkdir()
        searcher, _, _ = make_searcher(studies.open_study("s", folder, None), config)
        rates = []
        for index in range(24):
            rates.append(searcher.suggest(str(index))["trial"]["learning_rate"])
            finish(searcher, str(index), loss if index < 2 else 2.0 + abs(math.log(rates[-1])))
        runs.append(rates)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("num_trials, num_random", [(3, 4), (16, 5), (30, 10), (90, 10)])
def test_a_third_of_the_trials_but_4_to_10_is_drawn_without_a_model(
    study, make_config, monkeypatch, num_trials, num_random
):
    made, plain = [], optuna.samplers.TPESampler

    def sampler(**settings):
        made.append(settings)
        return plain(**settings)

    monkeypatch.setattr(optuna.samplers, "TPESampler", sampler)
    searcher, _, _ = make_searcher(study, make_config(tune={"num_trials": num_trials}))
    for name in "abc":
        searcher.suggest(name)
    assert made[-1]["n_startup_trials"] == num_random
    assert made[-1]["constant_liar"], "trials that run at the same time must differ"
    assert made[-1]["multivariate"] and made[-1]["group"], (
        "conditional parameters stay in the model"
    )
