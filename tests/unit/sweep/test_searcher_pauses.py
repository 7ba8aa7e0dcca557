"""Trials that a scheduler pauses, and trials that copy another: rosters and study entries."""

from types import SimpleNamespace

import pytest
from optuna.trial import TrialState

from higgs_tune.sweep import study as studies
from tests.sweep_fakes import AUDIO_LIMIT, make_searcher, report


def status_of(tune_id, status, config):
    """What the searcher reads of one of Tune's trials."""
    return SimpleNamespace(trial_id=tune_id, status=status, config=config)


def test_a_paused_trial_frees_its_slot_and_no_roster_evicts_it_on_return(study, make_config):
    searcher, rosters, _ = make_searcher(study, make_config(), rooms=lambda: [2])
    configs = {name: searcher.suggest(name) for name in "ab"}
    assert searcher.suggest("c") is None
    trials = [status_of("a", "PAUSED", configs["a"]), status_of("b", "RUNNING", configs["b"])]
    searcher.watch(trials)
    assert rosters[-1].live == ("t001",)
    configs["c"] = searcher.suggest("c")
    assert rosters[-1].live == ("t001", "t002")
    assert configs["a"]["roster_version"] > rosters[-1].version
    assert searcher.suggest("d") is None
    trials[0].status = "PENDING"  # Tune starts it: its lease is newer than any roster without it
    searcher.on_trial_complete("b", report(4.0, 50))
    assert rosters[-1].live == ("t000", "t002")
    assert rosters[-1].version >= configs["a"]["roster_version"]
    assert {t.state for t in study.trials} == {TrialState.RUNNING, TrialState.PRUNED}


def test_a_trial_whose_pause_is_over_gets_a_slot_before_a_new_one(study, make_config):
    searcher, rosters, _ = make_searcher(study, make_config(), rooms=lambda: [2])
    configs = {name: searcher.suggest(name) for name in "ab"}
    searcher.watch([status_of("a", "PAUSED", configs["a"])])
    to_come = rosters[-1].to_come
    searcher.on_unpause("a")
    assert rosters[-1].to_come == to_come + 1
    assert searcher.suggest("c") is None
    searcher.on_trial_result("a", report(4.0, 50))  # and is paused at the next rung
    assert searcher.suggest("c") is not None


@pytest.mark.parametrize("scheduler, to_come", [("pbt", 2), ("hyperband", 0)])
def test_a_pack_with_baselines_waits_for_a_population_that_is_all_paused(
    study, make_config, scheduler, to_come
):
    config = make_config(tune={"num_trials": 4, "scheduler": {"name": scheduler}})
    searcher, rosters, _ = make_searcher(study, config)
    trials = [status_of(name, "RUNNING", searcher.suggest(name)) for name in "abcd"]
    trials[2].status = "PAUSED"
    searcher.watch(trials)
    assert (rosters[-1].live, rosters[-1].to_come) == (("t000", "t001", "t003"), 0)
    trials[3].status = "PAUSED"
    searcher.watch(trials)
    assert (rosters[-1].live, rosters[-1].to_come) == (("t000", "t001"), to_come)
    for name in "cd":  # after the comparison
        searcher.on_unpause(name)
    assert rosters[-1].to_come == 2
    trials[2].status = "PENDING"
    searcher.watch(trials)
    assert (rosters[-1].live, rosters[-1].to_come) == (("t000", "t001", "t002"), 1)


def test_a_pack_waits_for_a_population_whose_last_running_trial_ends(study, make_config):
    config = make_config(tune={"num_trials": 4, "scheduler": {"name": "pbt"}})
    searcher, rosters, _ = make_searcher(study, config)
    trials = [status_of(name, "RUNNING", searcher.suggest(name)) for name in "abcd"]
    trials[2].status = "PAUSED"
    searcher.watch(trials)
    searcher.on_trial_complete("d", report(4.0, 50, "diverged"))
    assert (rosters[-1].live, rosters[-1].to_come) == (("t000", "t001"), 1)


def test_a_trials_later_start_has_a_higher_attempt_number(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    config = searcher.suggest("a")
    trial = status_of("a", "PENDING", config)
    known = [config["attempt"]]
    for status in ("PENDING", "RUNNING", "PAUSED", "PENDING"):
        trial.status = status
        searcher.watch([trial])
        known.append(config["attempt"])
    asked, again, running, paused, resumed = known
    assert asked < again == running < paused < resumed


def test_a_trial_stopped_while_paused_is_pruned_with_its_values(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_result("a", report(5.0, 25))
    searcher.on_trial_result("a", report(4.0, 50))
    searcher.on_trial_complete("a", None)
    (trial,) = study.trials
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["status"] == "pruned"
    assert trial.user_attrs["reason"] == "stopped by the scheduler at step 50"
    assert trial.intermediate_values == {25: 5.0, 50: 4.0}


def test_a_copy_gets_its_own_study_entry_without_parameters(study, make_config):
    copies = []
    searcher, _, _ = make_searcher(
        study, make_config(), on_copy=lambda record, donor_id: copies.append((record, donor_id))
    )
    configs = {name: searcher.suggest(name) for name in "abcd"}
    for name, value in (("c", 3.0), ("d", 5.0)):
        searcher.on_trial_result(name, report(value, 50))
    donor, former = configs["c"], configs["d"]
    rates = {**donor["rates"], "learning_rate": 2e-3}
    config = searcher.copied("d", "t002", rates, 50)
    assert (config["id"], config["rates"]) == ("t003", rates)
    assert config["trial"]["rank"] == donor["trial"]["rank"]
    assert config["trial"]["learning_rate"] == donor["trial"]["learning_rate"]
    assert config["trial"]["seed"] == former["trial"]["seed"]
    assert config["trial"]["schedule"] == [{"step": 50, "copied_from": "t002", **rates}]
    assert [(record.trial_id, donor_id) for record, donor_id in copies] == [("t003", "t002")]
    searcher.on_trial_complete("d", report(2.0, 150, "completed"))
    given_up, entry = study.trials[3:]
    assert given_up.state == TrialState.PRUNED and given_up.params
    assert given_up.intermediate_values == {50: 5.0}
    assert given_up.user_attrs["reason"] == "became a copy of t002 at step 50"
    assert (entry.state, entry.value, entry.params) == (TrialState.COMPLETE, 2.0, {})
    assert entry.intermediate_values == {50: 3.0, 150: 2.0}
    assert studies.record_of(studies.latest(study)[3]).config.schedule[0].step == 50


def test_an_interrupted_copy_is_resumed_with_its_schedule(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    for name in "abcd":
        searcher.suggest(name)
    searcher.on_trial_result("c", report(3.0, 50))
    searcher.on_trial_result("d", report(5.0, 50))
    rates = {**searcher._tune_config(searcher.live["c"], "")["rates"], "learning_rate": 2e-3}
    before = searcher.copied("d", "t002", rates, 50)
    searcher.cancel_live("interrupted")
    again, _, _ = make_searcher(study, make_config())
    resumed = [again.suggest(name) for name in "efgh"]
    assert [config["id"] for config in resumed] == ["t000", "t001", "t002", "t003"]
    assert resumed[3]["trial"] == before["trial"]
    assert resumed[3]["rates"] == rates


def test_a_copy_of_a_copy_keeps_the_whole_schedule_and_counts_its_donors_last_result(
    study, make_config
):
    searcher, _, _ = make_searcher(study, make_config())
    configs = {name: searcher.suggest(name) for name in "abcd"}
    for name, value, audio in (("b", 4.0, 2.0), ("c", 3.0, 2.5), ("d", 5.0, 3.0)):
        searcher.on_trial_result(name, report(value, 50, audio=audio))
    rates = configs["c"]["rates"]
    searcher.copied("d", "t002", {**rates, "learning_rate": 2e-3}, 50)
    config = searcher.copied("b", "t003", {**rates, "learning_rate": 3e-3}, 100)
    changes = [(change["step"], change["copied_from"]) for change in config["trial"]["schedule"]]
    assert changes == [(50, "t002"), (100, "t003")]
    searcher.on_trial_complete("d", None)  # stopped before its own first report
    entry = studies.latest(study)[3]
    assert entry.constraints["val/audio/nll_per_code"] == pytest.approx(2.5 - AUDIO_LIMIT)


def test_a_paused_trial_does_not_count_as_its_workers_load(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(), workers=["w0", "w1"])
    configs = {name: searcher.suggest(name) for name in "abc"}
    assert [config["worker"] for config in configs.values()] == [0, 1, 0]
    searcher.watch([status_of(name, "PAUSED", configs[name]) for name in "ac"])
    assert searcher.suggest("d")["worker"] == 0
