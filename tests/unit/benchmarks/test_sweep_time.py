"""What the sweep's comparison and the fixed costs make of what was run."""

import argparse

import fixed_costs
import pytest
import sweep_time
from stock_base import REPORTED, STARTED

from higgs_tune.config_file import load_sweep
from higgs_tune.metrics import STEP, VAL_TEXT_NLL

ARGS = argparse.Namespace(
    clips=2, num_steps=40, report_every=20, trials=5, slots=2, gpus=0, seed=7, scheduler="asha",
    val_clips=6,
)  # fmt: skip


def test_our_sweep_has_nothing_that_a_stock_model_lacks(tmp_path):
    config = load_sweep(sweep_time.settings_file(tmp_path, ARGS))
    assert config.space.cross_attention == ("off",)
    assert config.space.audio_loss_weight == 8.0  # embedded base: 8 codebooks
    assert config.confirm.num_configs == 0
    assert (config.tune.num_trials, config.train.num_steps, config.tune.seed) == (5, 40, 7)


def lines(*values):
    return [{STEP: 20 * (n + 1), VAL_TEXT_NLL: value} for n, value in enumerate(values)]


def test_final_losses_are_compared_trial_by_trial():
    ours = sweep_time.losses({"a": lines(5.0, 4.0), "b": lines(2.0), "c": lines(1.0)})
    theirs = sweep_time.losses({"a": lines(9.0, 4.4), "b": lines(2.0), "c": lines(0.5)})
    assert sweep_time.compare(ours, theirs) == {"median": 0.1, "largest": 0.5}
    with pytest.raises(SystemExit, match="other trials"):
        sweep_time.compare(ours, {"a": 1.0})


def test_a_way_is_summed_up_by_its_best_and_its_pace():
    found = sweep_time.summary(90.0, {"a": lines(5.0, 4.0), "b": lines(2.0)}, 60)
    assert (found["trials_per_hour"], found["best_trial"], found["best_text_nll"]) == (
        80.0,
        "b",
        2.0,
    )


def event(trial, step, time):
    return {"event": "result", "trial": trial, STEP: step, "time": time}


def test_our_gaps_are_those_between_rounds():
    # two slots; each round takes 10 s; c takes the slot of a, which ends in the second round
    rounds = {"a": (10.1, 10.2), "b": (10.1, 10.2, 10.3), "c": (10.3,)}
    results = {
        trial: [{STEP: 5 * (n + 1), "round_s": s} for n, s in enumerate(lengths)]
        for trial, lengths in rounds.items()
    }
    events = [
        {"event": "sweep_started", "time": 1003.0},
        event("a", 5, 1022.1), event("b", 5, 1022.4),
        event("a", 10, 1032.4), event("b", 10, 1032.5),
        event("b", 15, 1043.3), event("c", 5, 1043.2),
    ]  # fmt: skip
    found = fixed_costs.our_costs(1000.0, events, results)
    assert found["command_to_first_step_s"] == pytest.approx(12.0)
    assert found["rounds_s"] == pytest.approx([0.1])
    assert found["between_s"] == pytest.approx([0.5])


def test_their_gaps_are_those_between_an_end_and_the_next_start():
    spans = {"a": (10, 20), "b": (11, 25), "c": (22, 30), "d": (28, 40)}
    results = {
        trial: [{STARTED: begun, REPORTED: begun + 1}, {STARTED: begun, REPORTED: ended}]
        for trial, (begun, ended) in spans.items()
    }
    found = fixed_costs.their_costs(4.0, results, processes=2)
    assert found == {"command_to_first_step_s": 6.0, "between_s": [2, 3]}
    assert fixed_costs.summary([found])["between_s"] == 2.5
    with pytest.raises(SystemExit, match="no trial followed"):
        fixed_costs.summary([fixed_costs.their_costs(4.0, results, processes=4)])


def test_pictures_are_drawn():
    ways = {way: {"wall_s": s, "between_s": s, "command_to_first_step_s": s}
            for way, s in {"ours": 10.0, "plain": 80.0, "strong": 25.0}.items()}  # fmt: skip
    (bars,) = sweep_time.picture(ways).axes
    assert [text.get_text() for text in bars.texts] == ["10 s, 1.0 ×", "80 s, 8.0 ×", "25 s, 2.5 ×"]
    assert len(fixed_costs.picture(ways).axes) == 2
