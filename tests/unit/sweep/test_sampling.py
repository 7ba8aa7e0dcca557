"""What the sampler is told, and when it begins to choose."""

import math

import optuna
import pytest
from optuna.trial import TrialState

from tests.sweep_fakes import AUDIO_LIMIT, make_searcher, report


def test_a_loss_that_is_not_finite_never_reaches_the_study(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_result("a", report(5.0, 25))
    searcher.on_trial_complete("a", report(math.nan, 50, "diverged", reason="NaN at step 50"))
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].intermediate_values == {25: 5.0}


def test_the_sampler_learns_of_a_pruned_trials_audio_too(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_complete("a", report(5.0, 25, audio=AUDIO_LIMIT + 0.5))
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.constraints["val/audio/nll_per_code"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_trials, num_random", [(3, 4), (16, 5), (30, 10), (90, 10)])
def test_a_third_of_the_trials_at_most_is_drawn_without_a_model(
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
    assert made[-1]["constant_liar"], "trials that run at once must not be alike"
    assert made[-1]["multivariate"] and made[-1]["group"], (
        "conditional parameters stay in the model"
    )
