"""Whole sweeps of a population whose worst trials copy the best."""

import pytest
from optuna.trial import TrialState

from higgs_tune.sweep import study as studies
from tests.integration.test_schedulers import config_of, trained, tune, uninterrupted
from tests.integration.test_sweep import run, study_of, trials_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    """Two baselines and six other trials, which are compared at steps 50 and 100."""
    folder = tmp_path_factory.mktemp("population")
    return run(
        folder,
        tune=tune({"name": "pbt", "quantile_fraction": 0.3}, slots_per_worker=1),
        confirm={"num_configs": 1, "num_seeds": 1},
    )


def test_a_copy_continues_from_its_donors_weights_at_another_rate(population):
    trials = {n: t for n, t in trials_of(population.results).items() if n[0] == "t"}
    assert {t["status"]["status"] for t in trials.values()} == {"completed"}
    steps = []
    for name, trial in trials.items():
        config = config_of(trial)
        expected, seed = [], config.seed
        schedule = list(config.schedule)
        steps += [change.step for change in schedule]
        done = trained(population.results, name)
        assert [step for _, step, _ in done] == [25, 50, 75, 100, 125, 150]
        if not schedule:
            assert done == uninterrupted(config, 150)
            continue
        last = schedule[-1]
        donor = trained(population.results, last.copied_from)
        shared = [interval for interval in donor if interval[1] <= last.step]
        own = [[seed, step, last.learning_rate] for step in range(last.step + 25, 151, 25)]
        expected = shared + own
        assert done == expected
        before = config.rates_at(last.step - 1)["learning_rate"]
        assert last.learning_rate != before
        assert 1e-4 <= last.learning_rate <= 3e-3
    assert set(steps) == {50, 100}


def test_listed_rates_change_to_listed_values_only(tmp_path):
    rates = [3e-3, 1e-4, 1e-3, 3e-4]
    sweep = run(
        tmp_path,
        space={"learning_rate": rates},
        tune=tune({"name": "pbt", "quantile_fraction": 0.5}, slots_per_worker=2),
        confirm={"num_configs": 0},
    )
    trials = [config_of(t) for n, t in trials_of(sweep.results).items() if n >= "t002"]
    changes = [change for trial in trials for change in trial.schedule]
    assert {change.learning_rate for change in changes} <= set(rates)
    assert any(
        trial.rates_at(change.step - 1)["learning_rate"] != change.learning_rate
        for trial in trials
        for change in trial.schedule
    )


def test_baselines_neither_copy_nor_are_copied(population):
    trials = trials_of(population.results)
    for name in ("t000", "t001"):
        assert config_of(trials[name]).schedule == ()
    copied = [c.copied_from for t in trials.values() for c in config_of(t).schedule]
    assert not {"t000", "t001"} & set(copied)


def test_a_copy_is_recorded_in_the_study_without_parameters(population):
    study = study_of(population)
    newest = studies.latest(study)
    assert sorted(newest) == list(range(8))
    given_up = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    num_copies = sum("became a copy of" in trial.user_attrs["reason"] for trial in given_up)
    assert num_copies == len(given_up) == 4  # two at each of two steps
    assert len(study.trials) == 8 + 4
    for index, trial in newest.items():
        record = studies.record_of(trial)
        assert trial.state == TrialState.COMPLETE
        assert bool(record.config.schedule) == (index > 1 and not trial.params)
        assert sorted(trial.intermediate_values) == [25, 50, 75, 100, 125, 150]
    best = min(newest.values(), key=lambda trial: trial.values[0])
    assert population.best_trial == studies.record_of(best).trial_id


def test_the_confirm_stage_repeats_the_schedule(population):
    trials = trials_of(population.results)
    confirmed = next(
        t for n, t in trials.items() if t["record"]["confirms"] == population.best_trial
    )
    config = config_of(confirmed)
    assert config.schedule == config_of(trials[population.best_trial]).schedule
    name = confirmed["record"]["trial_id"]
    assert trained(population.results, name) == [
        [config.seed, step, config.rates_at(step - 25)["learning_rate"]]
        for step in range(25, 151, 25)
    ]
