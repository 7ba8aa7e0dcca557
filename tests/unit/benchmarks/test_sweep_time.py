"""How the sweep comparison and the fixed-cost benchmark evaluate their runs."""

import argparse

import fixed_costs
import pytest
import stock_tune
import sweep_time
from stock_base import REPORTED, STARTED

from higgs_tune.config_file import load_sweep
from higgs_tune.metrics import STEP, VAL_TEXT_NLL

ARGS = argparse.Namespace(
    clips=2, num_steps=40, report_every=20, trials=5, workers=1, slots=2, gpus=0, seed=7, scheduler="asha",
    val_clips=6,
)  # fmt: skip


def test_our_sweep_uses_only_what_a_stock_model_has(tmp_path):
    config = load_sweep(sweep_time.settings_file(tmp_path, ARGS))
    assert config.space.cross_attention == ("off",)
    assert config.space.audio_loss_weight == (8.0,)  # embedded base: 8 codebooks
    assert config.confirm.num_configs == 0
    assert (config.tune.num_trials, config.train.num_steps, config.tune.seed) == (5, 40, 7)


@pytest.mark.parametrize("script", [sweep_time, fixed_costs])
def test_default_arguments_make_a_sweep_of_one_worker(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])
    tune = load_sweep(sweep_time.settings_file(tmp_path, script.arguments())).tune
    assert (tune.num_workers, tune.slots_per_worker) == (1, 4)


@pytest.mark.parametrize("gpus, device", [(0, "cpu"), (1, "cuda")])
def test_our_sweep_and_the_stock_trials_use_the_same_device(gpus, device, tmp_path, monkeypatch):
    args = argparse.Namespace(**{**vars(ARGS), "gpus": gpus})
    config = load_sweep(sweep_time.settings_file(tmp_path, args))
    assert config.base.device == device
    shares = []

    def with_resources(trainable, share):
        shares.append(share)
        raise StopIteration

    machine = {"CPU": 8.0, "GPU": 4.0}  # ours is one worker with one GPU at most
    monkeypatch.setattr(stock_tune.ray, "cluster_resources", lambda: machine)
    monkeypatch.setattr(stock_tune.tune, "with_resources", with_resources)
    with pytest.raises(StopIteration):
        stock_tune.run_stock("strong", config, [], 2, tmp_path)
    assert shares == [{"cpu": 4, "gpu": gpus / 2}]


def lines(*values):
    return [{STEP: 20 * (n + 1), VAL_TEXT_NLL: value} for n, value in enumerate(values)]


def test_final_losses_are_compared_trial_by_trial():
    ours = sweep_time.losses({"a": lines(5.0, 4.0), "b": lines(2.0), "c": lines(1.0)})
    theirs = sweep_time.losses({"a": lines(9.0, 4.04), "b": lines(2.0), "c": lines(0.5)})
    assert sweep_time.compare(ours, theirs) == {"median": 0.01, "largest": 0.5}
    with pytest.raises(SystemExit, match="final losses of the same trials differ"):
        sweep_time.compare(ours, {trial: 1.1 * loss for trial, loss in ours.items()})
    with pytest.raises(SystemExit, match="not the same trials"):
        sweep_time.compare(ours, {"a": 1.0})


def test_summary_has_the_best_trial_and_trials_per_hour():
    found = sweep_time.summary([80.0, 200.0, 90.0], {"a": lines(5.0, 4.0), "b": lines(2.0)}, 60)
    assert (found["trials_per_hour"], found["best_trial"], found["best_text_nll"]) == (
        80.0,
        "b",
        2.0,
    )


def test_our_costs_are_the_first_step_and_the_refills():
    times = [
        ("sweep_started", 1003.0),
        ("training", 1012.1),
        ("result", 1022.1),
        ("training", 1050.0),
    ]
    events = [{"event": event, "time": time} for event, time in times]
    workers = {"worker-0": {"refill_median_s": 0.1}, "worker-1": {"refill_median_s": None}}
    found = fixed_costs.our_costs(1000.0, events, workers)
    assert found["command_to_first_step_s"] == pytest.approx(12.1)
    assert found["between_s"] == [0.1]


def test_stock_gaps_are_from_one_trials_end_to_the_next_start():
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
