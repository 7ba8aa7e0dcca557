from types import SimpleNamespace

import optuna
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from higgs_tune.config import SchedulerSettings, TrainSettings
from higgs_tune.sweep.scheduler import grace_steps, make_scheduler, replay

TRAIN = TrainSettings(num_steps=150, report_every_steps=25)


def finished(values):
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED, intermediate_values=values
    )


def decide(scheduler, tune_id, step, value):
    return scheduler.on_trial_result(
        None, SimpleNamespace(trial_id=tune_id), {"step": step, "val/text/nll": value}
    )


@pytest.mark.parametrize(
    ("fraction", "warmup", "num_steps", "expected"),
    [
        (0.34, 0.1, 150, 50),
        (0.01, 0.0, 150, 25),
        (0.1, 0.5, 150, 100),
        (1.0, 0.1, 150, 150),
        (1.0, 0.1, 160, 150),
    ],
)
def test_the_first_rung_is_a_reported_step_beyond_warmup(fraction, warmup, num_steps, expected):
    train = TrainSettings(num_steps=num_steps, report_every_steps=25, warmup_fraction=warmup)
    assert grace_steps(SchedulerSettings(grace_fraction=fraction), train) == expected


def test_rungs_are_rebuilt_from_the_study():
    settings = SchedulerSettings()
    fresh, rebuilt = make_scheduler(settings, TRAIN), make_scheduler(settings, TRAIN)
    for index, value in enumerate((2.0, 2.1, 2.2)):
        replay(rebuilt, f"earlier-{index}", finished({25: 6.0, 50: value}))
    for scheduler in (fresh, rebuilt):
        scheduler.on_trial_add(None, SimpleNamespace(trial_id="new"))
    assert decide(fresh, "new", 50, 4.0) == TrialScheduler.CONTINUE
    assert decide(rebuilt, "new", 50, 4.0) == TrialScheduler.STOP


def test_a_resumed_trial_is_not_judged_again_at_a_rung_it_passed():
    scheduler = make_scheduler(SchedulerSettings(), TRAIN)
    for index in range(5):
        replay(scheduler, f"earlier-{index}", finished({50: 2.0}))
    replay(scheduler, "resumed", finished({25: 9.0, 50: 9.0}))
    scheduler.on_trial_add(None, SimpleNamespace(trial_id="resumed"))
    assert decide(scheduler, "resumed", 75, 9.0) == TrialScheduler.CONTINUE


def test_a_diverged_trial_without_its_metric_leaves_the_rungs_alone():
    scheduler = make_scheduler(SchedulerSettings(), TRAIN)
    before = scheduler.debug_string()
    trial = SimpleNamespace(trial_id="bad")
    scheduler.on_trial_add(None, trial)
    scheduler.on_trial_complete(None, trial, {"step": 50, "status": "diverged"})
    assert scheduler.debug_string() == before


def test_no_early_stopping_when_it_is_switched_off():
    assert isinstance(make_scheduler(SchedulerSettings(name="none"), TRAIN), FIFOScheduler)
    replay(make_scheduler(SchedulerSettings(name="none"), TRAIN), "x", finished({50: 1.0}))
