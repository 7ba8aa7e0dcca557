import json
import random
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from pydantic import ValidationError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from higgs_tune.config import SchedulerSettings, SweepConfig
from higgs_tune.config_scheduler import hyperband
from higgs_tune.config_space import Range
from higgs_tune.config_steps import grace_steps, num_checkpoints
from higgs_tune.sweep.pausing import mutation, seeded
from higgs_tune.sweep.scheduler import (
    Earlier,
    make_scheduler,
    replay,
)
from higgs_tune.sweep.search import steps_behind
from higgs_tune.sweep.study import RECORD, TrialRecord
from tests.models import trial as trial_config


def scheduler_of(name="asha", **settings):
    """A scheduler of a sweep of 150 steps that reports every 25."""
    return make_scheduler(
        SweepConfig.model_validate({"tune": {"scheduler": {"name": name, **settings}}})
    )


def finished(values, origin="search"):
    record = TrialRecord("t000", 0, "t000", origin, None, trial_config())
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        intermediate_values=values,
        user_attrs={RECORD: json.dumps(record.to_dict())},
    )


def decide(scheduler, tune_id, step, value):
    return scheduler.on_trial_result(None, Earlier(tune_id), {"step": step, "val/text/nll": value})


@pytest.mark.parametrize(
    ("fraction", "warmup", "num_steps", "expected"),
    [
        (0.34, 0.1, 150, 50),
        (0.01, 0.0, 150, 25),
        (0.1, 0.5, 150, 100),
        (1.0, 0.1, 150, 150),
        (1.0, 0.1, 160, 150),
        (1.0, 0.1, 140, 140),  # the last step is reported
        (0.1, [0.5, 0.1], 150, 100),  # the longest counts
        (0.1, {"low": 0.1, "high": 0.5}, 150, 100),
    ],
)
def test_the_first_rung_is_a_reported_step_beyond_warmup(fraction, warmup, num_steps, expected):
    config = SweepConfig.model_validate(
        {
            "train": {"num_steps": num_steps, "report_every_steps": 25},
            "space": {"warmup_fraction": warmup},
            "tune": {"scheduler": {"grace_fraction": fraction}},
        }
    )
    assert grace_steps(config) == expected


def test_rungs_are_rebuilt_from_the_study():
    fresh, rebuilt = scheduler_of(), scheduler_of()
    for index, value in enumerate((2.0, 2.1, 2.2)):
        replay(rebuilt, f"earlier-{index}", finished({25: 6.0, 50: value}), ended=True)
    for scheduler in (fresh, rebuilt):
        scheduler.on_trial_add(None, Earlier("new"))
    assert decide(fresh, "new", 50, 4.0) == TrialScheduler.CONTINUE
    assert decide(rebuilt, "new", 50, 4.0) == TrialScheduler.STOP


def test_a_trial_that_passed_a_rung_counts_at_the_next_in_any_replay_order():
    scheduler = scheduler_of(reduction_factor=2)
    for index, values in enumerate([{50: 2.0}, {50: 2.1}, {50: 9.0, 75: 5.0, 100: 1.0}]):
        replay(scheduler, f"earlier-{index}", finished(values), ended=True)
    scheduler.on_trial_add(None, Earlier("new"))
    assert decide(scheduler, "new", 50, 1.9) == TrialScheduler.CONTINUE
    assert decide(scheduler, "new", 100, 1.1) == TrialScheduler.STOP


def test_a_resumed_trial_is_not_judged_again_at_a_rung_it_passed():
    scheduler = scheduler_of()
    for index in range(5):
        replay(scheduler, f"earlier-{index}", finished({50: 2.0}), ended=True)
    replay(scheduler, "resumed", finished({25: 9.0, 50: 9.0}), ended=False)
    scheduler.on_trial_add(None, Earlier("resumed"))
    assert decide(scheduler, "resumed", 75, 9.0) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("name", ["asha", "median", "hyperband", "pbt"])
def test_baselines_are_neither_judged_nor_compared_with(name):
    scheduler = scheduler_of(name)
    before = scheduler.debug_string()
    for origin, value in (("baseline", 9.0), ("baseline_fixed", 1.0)):
        trial = Earlier(origin)
        trial.config = {"record": {"origin": origin}}
        scheduler.on_trial_add(None, trial)
        for step in (50, 75, 100, 125, 150):
            result = {"step": step, "val/text/nll": value}
            assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE
        scheduler.on_trial_complete(None, trial, result)
        trial.status = Trial.RUNNING  # another ends because its process dies or the sweep ends
        scheduler.on_trial_error(None, trial)
        scheduler.on_trial_remove(None, trial)
    assert scheduler.debug_string() == before


def test_a_replayed_baseline_does_not_change_the_rungs():
    scheduler = scheduler_of()
    before = scheduler.debug_string()
    replay(scheduler, "earlier-0", finished({50: 2.0}, "baseline"), ended=True)
    assert scheduler.debug_string() == before


def test_a_diverged_trial_without_its_metric_does_not_change_the_rungs():
    scheduler = scheduler_of()
    before = scheduler.debug_string()
    trial = Earlier("bad")
    scheduler.on_trial_add(None, trial)
    scheduler.on_trial_complete(None, trial, {"step": 50, "status": "diverged"})
    assert scheduler.debug_string() == before


def test_hyperband_gets_the_earlier_values_of_a_resumed_trial():
    scheduler = scheduler_of("hyperband")
    replay(scheduler, "resumed", finished({25: 9.0, 50: 8.0}), ended=False)
    assert scheduler.earlier == {"resumed": {25: 9.0, 50: 8.0}}


def test_no_early_stopping_when_it_is_switched_off():
    assert isinstance(scheduler_of("none"), FIFOScheduler)
    replay(scheduler_of("none"), "x", finished({50: 1.0}), ended=True)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("hyperband", {"grace_fraction": 0.5}),
        ("median", {"reduction_factor": 4}),
        ("asha", {"min_samples": 2}),
        ("asha", {"perturb_every_steps": 25}),
        ("median", {"quantile_fraction": 0.5}),
    ],
)
def test_a_setting_without_effect_is_refused(name, setting):
    (field,) = setting
    with pytest.raises(ValidationError, match=f"{field} has no effect with the scheduler {name}"):
        SchedulerSettings.model_validate({"name": name, **setting})
    SchedulerSettings.model_validate({"name": "none", **setting})


def test_settings_reach_their_scheduler():
    band = scheduler_of("hyperband", reduction_factor=2)._band
    assert band == hyperband(150, 25, 2.0) != hyperband(150, 25, 3.0)
    assert scheduler_of("pbt", quantile_fraction=0.4)._quantile_fraction == 0.4


def test_a_reduction_factor_with_coinciding_rungs_is_refused():
    with pytest.raises(ValidationError, match="reduction_factor must be 2 or more"):
        SchedulerSettings(name="hyperband", reduction_factor=1.5)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (
            {"num_trials": 3, "scheduler": {"name": "pbt"}},
            r"tune.num_trials leaves 1 for a population .*: pbt needs two or more",
        ),
        (
            {"scheduler": {"name": "pbt", "perturb_every_steps": 30}},
            r"perturb_every_steps \(30\) must be a multiple of train.report_every_steps \(25\)",
        ),
    ],
)
def test_an_impossible_population_is_refused(tune, message):
    with pytest.raises(ValidationError, match=message):
        SweepConfig.model_validate({"tune": tune})


def test_a_population_may_have_another_member_instead_of_the_second_baseline():
    tune = {"num_trials": 3, "scheduler": {"name": "pbt"}}
    SweepConfig.model_validate({"tune": tune, "baseline": {"with_audio_self": False}})


def median_of(values, **settings):
    scheduler = scheduler_of("median", **settings)
    for index, value in enumerate(values):
        replay(scheduler, f"earlier-{index}", finished({25: 9.0, 50: value}), ended=True)
    return scheduler


@pytest.mark.parametrize(
    ("value", "min_samples", "expected"),
    [(2.2, 3, "STOP"), (2.0, 3, "CONTINUE"), (9.0, 4, "CONTINUE")],
)
def test_the_median_rule_counts_trials_of_earlier_runs(value, min_samples, expected):
    # averages from the end of the grace period on; their median is 2.1
    scheduler = median_of([2.0, 2.1, 2.2], min_samples=min_samples)
    trial = Earlier("new")
    scheduler.on_trial_add(None, trial)
    result = {"step": 50, "val/text/nll": value}
    assert scheduler.on_trial_result(None, trial, result) == expected


def test_trials_that_ended_in_an_earlier_run_are_not_judged_again():
    """With several workers, or a late one, index is not run order: by index, `slow` would stop at 50."""
    scheduler = scheduler_of("median")
    for index, value in enumerate((2.0, 2.1, 2.2)):
        replay(scheduler, f"earlier-{index}", finished({50: value, 75: value}), ended=True)
    replay(scheduler, "slow", finished({50: 9.0, 75: 8.0, 100: 1.5}), ended=True)
    scheduler.on_trial_add(None, trial := Earlier("new"))
    result = {"step": 100, "val/text/nll": 1.0}
    assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_stop_is_repeated_if_the_trials_process_died_before_it(name):
    scheduler, controller = scheduler_of(name), SimpleNamespace()
    for index, value in enumerate((2.0, 2.1, 2.2)):
        replay(scheduler, f"earlier-{index}", finished({50: value}), ended=True)
    trial, result = Earlier("bad"), {"step": 50, "val/text/nll": 9.0}
    scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, trial, result) == TrialScheduler.STOP
    scheduler.on_trial_error(controller, trial)
    scheduler.on_trial_add(controller, trial)
    assert scheduler.on_trial_result(controller, trial, result) == TrialScheduler.STOP


def test_a_stopped_trials_last_result_counts_once_live_and_after_a_resume():
    live, resumed = scheduler_of("median"), scheduler_of("median")
    others = [{50: value} for value in (1.0, 2.0, 8.0, 9.0)]
    slow = {50: 3.0, 75: 9.0}  # its mean is 6
    for scheduler in (live, resumed):
        for index, values in enumerate(others[:2]):
            replay(scheduler, f"earlier-{index}", finished(values | {75: 1.0}), ended=True)
    trial = Earlier("slow")
    live.on_trial_add(None, trial)
    for step, value in slow.items():
        result = {"step": step, "val/text/nll": value}
        live.on_trial_result(None, trial, result)
    live._stopped_trials.add(trial)
    live.on_trial_complete(None, trial, result)
    replay(resumed, "slow", finished(slow), ended=True)
    means = [
        [scheduler._running_mean(one, 75) for one in scheduler._results if one.trial_id == "slow"]
        for scheduler in (live, resumed)
    ]
    assert means == [[6.0], [6.0]]


@pytest.mark.parametrize(("best", "expected"), [(1.9, "CONTINUE"), (2.5, "STOP")])
def test_a_resumed_trial_is_judged_by_its_best_so_far(best, expected):
    scheduler = scheduler_of("median")
    for index, value in enumerate((2.0, 2.1, 2.2)):
        replay(scheduler, f"earlier-{index}", finished({50: value, 75: value}), ended=True)
    replay(scheduler, "resumed", finished({50: best}), ended=False)
    scheduler.on_trial_add(None, trial := Earlier("resumed"))
    result = {"step": 75, "val/text/nll": 8.0}
    assert scheduler.on_trial_result(None, trial, result) == expected


def test_the_median_rule_ignores_a_trial_without_its_metric():
    scheduler = median_of([2.0, 2.1, 2.2])
    bad = Earlier("bad")
    scheduler.on_trial_add(None, bad)
    scheduler.on_trial_complete(None, bad, {"step": 75, "status": "diverged"})
    scheduler.on_trial_complete(None, bad, {"status": "out_of_memory"})
    scheduler.on_trial_add(None, trial := Earlier("new"))
    result = {"step": 50, "val/text/nll": 3.0}
    assert scheduler.on_trial_result(None, trial, result) == TrialScheduler.STOP


@pytest.mark.parametrize(
    ("settings", "unfinished", "expected"),
    [
        ({}, [], 50),
        ({"perturb_every_steps": 25}, [], 50),  # not before the grace
        ({"perturb_every_steps": 75, "grace_fraction": 0.1}, [], 75),
        ({}, [25, 50], 100),  # one has reached 50
        ({}, [0, 25], 50),
    ],
)
def test_a_population_first_compares_at_a_step_that_no_trial_has_reached(
    settings, unfinished, expected
):
    config = SweepConfig.model_validate({"tune": {"scheduler": {"name": "pbt", **settings}}})
    scheduler = make_scheduler(config, unfinished)
    assert scheduler._next_perturbation_sync == expected


def test_the_steps_of_baselines_do_not_delay_a_resumed_population():
    config = trial_config()
    records = [
        TrialRecord(f"t{n}", n, f"t{n}", origin, None, config)
        for n, origin in enumerate(("baseline", "search", "search", "search"))
    ]
    steps = {"t0": 125, "t1": 50, "t2": 25}
    found = steps_behind(records, lambda name: (Path(name), steps[name]) if name in steps else None)
    assert found == [50, 25]


def test_listed_rates_are_offered_in_order():
    assert mutation((3e-3, 1e-4, 1e-3)) == [1e-4, 1e-3, 3e-3], "Tune moves to a neighbour"


def test_rates_are_drawn_from_their_range_and_repeat_with_the_seed():
    ranges = [Range(low=1e-4, high=1e-2, log=True), Range(low=0.5, high=2.0)]
    state = random.getstate()
    drawn = []
    for _ in range(2):
        with seeded("1:50"):
            drawn.append([mutation(bounds)() for bounds in ranges for _ in range(200)])
    assert drawn[0] == drawn[1]
    assert random.getstate() == state
    log_scale, plain = drawn[0][:200], drawn[0][200:]
    assert 1e-4 <= min(log_scale) < 2e-4 and 5e-3 < max(log_scale) <= 1e-2
    # half lie below the geometric mean
    assert sorted(log_scale)[100] == pytest.approx(1e-3, rel=0.6)
    assert 0.5 <= min(plain) < 0.6 and 1.9 < max(plain) <= 2.0


@pytest.mark.parametrize(
    "name, perturb, expected", [("pbt", 25, 3), ("pbt", 50, 4), ("asha", None, 1)]
)
def test_a_donors_checkpoint_is_kept_until_it_has_been_read(name, perturb, expected):
    """Those from one comparison up to and including the next, and one to spare."""
    settings = {"name": name} if perturb is None else {"name": name, "perturb_every_steps": perturb}
    config = SweepConfig.model_validate(
        {"train": {"report_every_steps": 25}, "tune": {"scheduler": settings}}
    )
    assert num_checkpoints(config) == expected
