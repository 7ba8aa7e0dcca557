import errno
import math
import os
from pathlib import Path

import optuna
from optuna.trial import TrialState

from higgs_tune.sweep import study as studies
from higgs_tune.sweep.searcher import MAX_DUPLICATES
from higgs_tune.sweep.source import FINISHED
from tests.sweep_fakes import AUDIO_LIMIT, finish, make_searcher, report


def test_trials_0_and_1_are_the_baselines(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(baseline={"rank": 64}))
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert (first["id"], second["id"]) == ("t000", "t001")
    assert first["trial"]["rank"] == second["trial"]["rank"] == 64
    assert first["trial"]["cross_attention"] == "off"
    assert second["trial"]["cross_attention"] == "audio_self"
    assert "audio_attention" in second["trial"]["targets"]
    assert first["record"]["origin"] == "baseline"
    assert second["record"]["origin"] == "baseline_fixed"
    assert first["trial"]["seed"] != second["trial"]["seed"]


def test_trial_1_is_sampled_if_the_second_baseline_is_left_out(study, make_config):
    config = make_config(
        baseline={"with_audio_self": False},
        space={"cross_attention": "off"},
        tune={"num_trials": 3},
    )
    assert config.cross_attention_modes == {"off"}
    searcher, _, _ = make_searcher(study, config)
    suggested = [searcher.suggest(name) for name in ("a", "b", "c")]
    assert [each["record"]["origin"] for each in suggested] == ["baseline", "search", "search"]
    assert [each["id"] for each in suggested] == ["t000", "t001", "t002"]
    assert {each["trial"]["cross_attention"] for each in suggested} == {"off"}


def test_the_sampler_learns_from_a_baseline_inside_the_space(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    assert study.trials[0].params["rank"] == 16


def test_sampling_works_with_a_baseline_outside_the_space(study, make_config):
    config = make_config(baseline={"rank": 64}, tune={"num_trials": 30})
    searcher, _, _ = make_searcher(study, config)
    for number in range(30):
        suggestion = searcher.suggest(str(number))
        finish(searcher, str(number), 2.0 + abs(math.log10(suggestion["trial"]["learning_rate"])))
    sampled = [trial.params for trial in study.trials[2:]]
    assert all({"rank", "learning_rate", "cross_attention"} == set(params) for params in sampled)
    assert all(params["rank"] in (4, 8, 16, 32) for params in sampled)
    assert study.trials[0].params == {}


def test_a_full_budget_trial_is_complete_and_a_stopped_one_pruned_with_its_values(
    study, make_config
):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.suggest("b")
    finish(searcher, "a", 2.0)
    searcher.on_trial_result("b", report(5.0, 25))
    searcher.on_trial_complete("b", report(4.0, 50))
    complete, pruned = study.trials
    assert (complete.state, complete.value) == (TrialState.COMPLETE, 2.0)
    assert complete.intermediate_values == {75: 3.0, 150: 2.0}
    assert pruned.state == TrialState.PRUNED
    assert pruned.intermediate_values == {25: 5.0, 50: 4.0}
    assert pruned.user_attrs["status"] == "pruned"


def test_a_diverged_trial_is_pruned_with_its_reason_and_without_its_last_loss(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_result("a", report(5.0, 25))
    last = report(math.nan, 50, "diverged", reason="NaN at step 50")
    del last["val/text/nll"]
    searcher.on_trial_complete("a", last)
    trial = study.trials[0]
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["status"] == "diverged"
    assert trial.user_attrs["reason"] == "NaN at step 50"
    assert trial.intermediate_values == {25: 5.0}


def test_a_trial_that_tune_gives_up_is_left_to_a_resumed_sweep(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.on_trial_complete("a", error=True)
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["status"] == "cancelled"
    assert study.trials[0].user_attrs["reason"].startswith("Ray Tune gave it up")
    assert len(studies.unfinished(study)) == 1


def test_the_best_trial_meets_the_audio_constraint(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    for name in "abc":
        searcher.suggest(name)
    finish(searcher, "a", 3.0)
    finish(searcher, "b", 1.0, audio=AUDIO_LIMIT + 0.01)
    finish(searcher, "c", 2.0, audio=AUDIO_LIMIT)
    assert study.best_trial.number == 2
    assert [record.trial_id for record in studies.best_records(study, 5)] == ["t002", "t000"]


def test_a_trial_that_was_stopped_is_never_the_best(study, make_config):
    """Optuna takes its last report, made after fewer steps, as its value."""
    searcher, _, _ = make_searcher(study, make_config())
    for name in "ab":
        searcher.suggest(name)
    finish(searcher, "a", 3.0)
    searcher.on_trial_complete("b", report(1.0, 75))
    assert study.trials[1].state == TrialState.PRUNED
    assert study.trials[1].value == 1.0
    assert [record.trial_id for record in studies.best_records(study, 5)] == ["t000"]


def test_a_step_that_is_reported_twice_counts_once(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    for value in (5.0, 4.9):  # a restarted trial repeats the interval
        searcher.on_trial_result("a", report(value, 25))
    assert study.trials[0].intermediate_values == {25: 5.0}


def test_a_duplicate_is_dropped_and_another_is_drawn(study, make_config, monkeypatch):
    config = make_config(tune={"num_trials": 4})
    searcher, _, _ = make_searcher(study, config)
    for name in "ab":
        searcher.suggest(name)
    first = searcher.suggest("c")["trial"]
    drawn = [first["learning_rate"], first["learning_rate"], 2e-3]
    kept = {name: first[name] for name in ("rank", "cross_attention")}

    def ask():
        study.enqueue_trial({**kept, "learning_rate": drawn.pop(0)})
        return study.ask()

    monkeypatch.setattr(searcher, "_ask", ask)
    fourth = searcher.suggest("d")
    assert fourth["id"] == "t003"
    assert fourth["trial"]["learning_rate"] == 2e-3
    dropped = [trial for trial in study.trials if "duplicate_of" in trial.user_attrs]
    assert [trial.user_attrs["duplicate_of"] for trial in dropped] == ["t002", "t002"]
    assert {trial.state for trial in dropped} == {TrialState.FAIL}
    assert searcher.suggest("e") is None


def test_the_search_is_over_when_its_last_trial_has_ended(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(tune={"num_trials": 2}))
    for name in "ab":
        searcher.suggest(name)
    finish(searcher, "a", 2.0)
    # not FINISHED yet: Tune would end the processes that paused trials will need
    assert searcher.suggest("c") is None
    finish(searcher, "b", 2.0)
    assert searcher.suggest("c") == FINISHED


def test_an_exhausted_space_gives_a_replicate_instead_of_asking_for_ever(
    study, make_config, monkeypatch
):
    searcher, _, _ = make_searcher(study, make_config(tune={"num_trials": 4}))
    for name in "ab":
        searcher.suggest(name)

    def ask():
        study.enqueue_trial({"rank": 4, "learning_rate": 1e-3, "cross_attention": "off"})
        return study.ask()

    monkeypatch.setattr(searcher, "_ask", ask)
    third, fourth = searcher.suggest("c"), searcher.suggest("d")
    assert third["trial"]["seed"] != fourth["trial"]["seed"]
    assert len(study.trials) == 4 + MAX_DUPLICATES


def test_the_same_seed_gives_the_same_suggestions(tmp_path, make_config):
    config = make_config(tune={"num_trials": 20, "seed": 7})
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        searcher, _, _ = make_searcher(studies.open_study("s", tmp_path / name, None), config)
        trials = []
        for number in range(20):
            trial = searcher.suggest(str(number))["trial"]
            trials.append(trial)
            finish(searcher, str(number), 2.0 + abs(math.log10(trial["learning_rate"])))
        runs.append(trials)
    assert runs[0] == runs[1]


def test_a_resumed_sweep_does_not_repeat_the_samplers_suggestions(study, make_config):
    config = make_config(tune={"num_trials": 4})
    searcher, _, _ = make_searcher(study, config)
    before = [searcher.suggest(str(number))["trial"] for number in range(4)]
    for number in range(4):
        finish(searcher, str(number), 2.0)
    searcher, _, _ = make_searcher(study, make_config(tune={"num_trials": 8}))
    after = [searcher.suggest(f"r{number}")["trial"] for number in range(4)]
    rates = [trial["learning_rate"] for trial in before[2:] + after]
    assert len(set(rates)) == len(rates)


def test_stale_running_trials_are_failed_and_resumed_under_their_ids(study, make_config):
    config = make_config()
    searcher, _, _ = make_searcher(study, config)
    for name in "abc":
        searcher.suggest(name)
    finish(searcher, "a", 3.0)
    searcher.on_trial_result("c", report(5.0, 25))
    searcher.on_trial_result("c", report(4.0, 50))
    lost = searcher.live["c"].record.config

    studies.fail_stale(study)
    assert not [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    checkpoints = {"t002": (Path("/checkpoint"), 25)}
    searcher, _, resumed = make_searcher(study, config, checkpoints)
    assert searcher.num_to_come() == 7
    again, third = searcher.suggest("b2"), searcher.suggest("c2")
    assert [again["id"], third["id"]] == ["t001", "t002"]
    assert third["trial"] == lost.model_dump(mode="json")
    assert third["restore_from"] == "/checkpoint"
    assert again["restore_from"] == ""
    # What lies beyond the checkpoint is trained and reported again.
    assert resumed == [("b2", {}), ("c2", {25: 5.0})]
    searcher.on_trial_result("c2", report(4.5, 50))
    newest = studies.latest(study)[2]
    assert newest.intermediate_values == {25: 5.0, 50: 4.5}
    assert searcher.suggest("d")["id"] == "t003"


def test_a_trial_that_was_queued_but_never_asked_for_is_failed(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    study.enqueue_trial({"rank": 4})  # the process ended here
    studies.fail_stale(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    assert [trial.user_attrs["index"] for trial in studies.unfinished(study)] == [0]
    searcher, _, _ = make_searcher(study, make_config())
    assert [searcher.suggest(name)["id"] for name in "bc"] == ["t000", "t001"]


def test_cancelled_trials_fail_with_their_reason_and_are_resumed(study, make_config):
    searcher, rosters, _ = make_searcher(study, make_config())
    searcher.suggest("a")
    searcher.cancel_live("interrupted by SIGINT")
    assert study.trials[0].state == TrialState.FAIL
    assert study.trials[0].user_attrs["reason"] == "interrupted by SIGINT"
    assert rosters[-1].live == ()
    assert [trial.number for trial in studies.unfinished(study)] == [0]


def test_the_roster_has_the_live_trials_and_the_number_to_come(study, make_config):
    searcher, rosters, _ = make_searcher(study, make_config(tune={"num_trials": 3}))
    searcher.suggest("a")
    assert (rosters[-1].live, rosters[-1].to_come) == (("t000",), 2)
    finish(searcher, "a", 2.0)
    assert (rosters[-1].live, rosters[-1].to_come) == ((), 2)
    assert rosters[-1].version == 2
    searcher.stop()
    assert rosters[-1].to_come == 0
    assert searcher.suggest("b") == FINISHED


def test_no_trial_starts_after_the_time_limit(study, make_config):
    searcher, rosters, _ = make_searcher(study, make_config(), deadline=0.0)
    assert searcher.suggest("a") == FINISHED
    searcher.publish()
    assert rosters[-1].to_come == 0


def test_a_torn_journal_line_is_dropped_and_the_study_goes_on(tmp_path, make_config):
    searcher, _, _ = make_searcher(studies.open_study("s", tmp_path, None), make_config())
    searcher.suggest("a")
    with (tmp_path / studies.JOURNAL).open("ab") as file:
        file.write(b'{"op_code":5,"wor')
    study = studies.open_study("s", tmp_path, None)
    studies.fail_stale(study)
    assert study.trials[0].state == TrialState.FAIL
    assert len(optuna.load_study(study_name="s", storage=study._storage).trials) == 1


def test_a_journal_that_cannot_be_written_ends_the_search_and_stays_readable(
    tmp_path, make_config, monkeypatch
):
    study = studies.open_study("s", tmp_path, None)
    errors = []
    searcher, rosters, _ = make_searcher(study, make_config(), on_study_error=errors.append)
    searcher.suggest("a")
    searcher.suggest("b")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        searcher.on_trial_result("a", report(5.0, 25))
    before = (tmp_path / studies.JOURNAL).read_bytes()
    searcher.on_trial_complete("a", report(2.0, 150, "completed"))
    searcher.cancel_live("full")
    assert searcher.suggest("c") == FINISHED
    assert len(errors) == 1
    assert rosters[-1].live == ()
    assert (tmp_path / studies.JOURNAL).read_bytes() == before
    again = studies.open_study("s", tmp_path, None)
    studies.fail_stale(again)
    assert [trial.user_attrs["index"] for trial in studies.unfinished(again)] == [0, 1]
