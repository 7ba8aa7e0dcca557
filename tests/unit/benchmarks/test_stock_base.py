"""The stock trainables of the sweep comparison reach the same losses as our loop."""

import pytest
import stock_tune
import torch
from peft import PeftModel
from stock_base import StockBase, labelled_inputs

from higgs_tune.config import ALL_LINEAR, BaseSettings, DataSettings, SweepConfig, TrialConfig
from higgs_tune.metrics import STEP, VAL_AUDIO_NLL, VAL_TEXT_NLL
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.models import NUM_CODEBOOKS, example

SWEEP = SweepConfig(base=BaseSettings(device="cpu"), data=DataSettings(num_val_clips=4))
TRIAL = TrialConfig(
    rank=4,
    alpha=32,
    # no text head: without text in a step, stock AdamW skips it; ours applies its momentum
    targets=ALL_LINEAR,
    learning_rate=3e-3,
    audio_loss_weight=8.0,  # turns our mean over 8 codebooks into the stock loss's sum
    batch_clips=2,
    num_steps=6,
    report_every_steps=3,
    warmup_fraction=0.34,
    seed=3,
)
CONFIG = {
    "sweep": SWEEP.model_dump(mode="json"),
    "threads": 1,
    "number": 0,
    "trials": [{"id": "t", "trial": TRIAL.model_dump(mode="json"), "stop_at": 6}],
}


@pytest.fixture(scope="module")
def ours():
    """Our loop's metrics of the bare base, its adapter's initial weights, its results."""
    loop = PackLoop.load(SWEEP.base, SWEEP.data, PackLimits.of([TRIAL], num_slots=1))
    loop.join("t", TRIAL)
    weights = {name: w.clone() for name, w in loop.engine.state("t").weights.items()}
    return loop.base_metrics, weights, [loop.advance()["t"] for _ in range(2)]


def start_as(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {n.removeprefix("base_model.model.").replace(".default.", "."): n for n in trained}
    assert plain.keys() == weights.keys()
    with torch.no_grad():
        for name, full in plain.items():
            trained[full].copy_(weights[name])


def assert_same(theirs, ours):
    """AdamW magnifies rounding where a gradient is near 0, hence the tolerance."""
    assert [line[STEP] for line in theirs] == [line[STEP] for line in ours]
    for mine, other in zip(ours, theirs, strict=True):
        for name in (VAL_TEXT_NLL, VAL_AUDIO_NLL):
            assert other[name] == pytest.approx(mine[name], rel=1e-4)


def test_the_strong_stock_trial_has_the_losses_of_our_loop(ours):
    bare, weights, results = ours
    trial = stock_tune.StrongTrial.__new__(stock_tune.StrongTrial)  # without Tune around it
    trial._base = StockBase(SWEEP.base, SWEEP.data)
    trial._begin(CONFIG)
    untouched = trial._base.validate(trial._model)
    for name in (VAL_TEXT_NLL, VAL_AUDIO_NLL):
        assert untouched[name] == pytest.approx(bare[name], rel=1e-5)
    assert abs(results[-1][VAL_TEXT_NLL] - bare[VAL_TEXT_NLL]) > 0.1  # it has learnt
    for _ in range(2):  # the second time in a process that has trained before
        start_as(trial._model, weights)
        lines = [trial.step(), trial.step()]
        assert_same(lines, results)
        assert lines[-1]["done"] and not lines[0]["done"]
        trial.reset_config(CONFIG)


def test_the_plain_stock_trial_has_the_losses_of_our_loop(ours, monkeypatch):
    _, weights, results = ours
    lines = []

    class Started(StockBase):
        def adapted(self, trial):
            model = super().adapted(trial)
            start_as(model, weights)
            return model

    monkeypatch.setattr(stock_tune, "StockBase", Started)
    monkeypatch.setattr(stock_tune.tune, "report", lines.append)
    threads = torch.get_num_threads()
    stock_tune.plain_trial(CONFIG)
    torch.set_num_threads(threads)
    assert_same(lines, results)


def test_a_modality_without_targets_gets_no_labels():
    heard, said = example("transcribe", 0), example("speak", 1)
    assert "audio_labels" not in labelled_inputs([heard], NUM_CODEBOOKS)
    assert "labels" not in labelled_inputs([said], NUM_CODEBOOKS)
    assert {"labels", "audio_labels"} <= labelled_inputs([heard, said], NUM_CODEBOOKS).keys()
