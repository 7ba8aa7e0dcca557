"""How many trials of a sweep a machine can hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import HiggsAudioV2Config

from higgs_tune.config_file import load_sweep
from higgs_tune.data.collate import split_micro_batches
from higgs_tune.train import capacity
from higgs_tune.train.capacity import (
    largest_step,
    most_parameters,
    predict_modes,
    slots_on_cpu,
    slots_on_gpu,
)
from higgs_tune.train.fit_cli import base_shape, fit
from higgs_tune.train.memory import RESERVE, memory_of_slots

QUICK = Path(__file__).parents[3] / "sweeps" / "quick.yaml"
SMALL = ["train.token_budget=256", "space.batch_clips=[2]", "space.cross_attention=[off]"]


@pytest.fixture(scope="module")
def config():
    return load_sweep(QUICK, SMALL)


@pytest.fixture(scope="module")
def shape(config):
    """The embedded base's configuration, with one layer."""
    embedded = base_shape(config.base, None)
    return HiggsAudioV2Config.from_dict({**embedded.to_dict(), "num_hidden_layers": 1})


@pytest.fixture(scope="module")
def by_slots(config, shape):
    return {n: predict_modes(config, shape, n, largest_step(config, shape))[0] for n in (1, 2)}


@pytest.fixture
def predicted(monkeypatch, by_slots):
    """Replaces predictions by those of `by_slots`, to save time."""
    monkeypatch.setattr(capacity, "predict_modes", lambda config, shape, n, step: [by_slots[n]])


def test_every_further_slot_needs_the_same_memory(config, shape):
    searched = load_sweep(QUICK, [*SMALL, "space.cross_attention=[off, text_to_audio]"])
    by_slots = (predict_modes(searched, shape, n, largest_step(searched, shape)) for n in (1, 2, 3))
    for one, two, three in zip(*by_slots, strict=True):
        assert memory_of_slots(one, two, 3) == three


def test_without_the_second_baseline_no_slot_needs_new_modules(config, shape):
    """They are most of an adapter's memory, and trial 1 alone would need them."""
    only_off = [*SMALL, "space.cross_attention=off"]
    found = {}
    for with_flag in ("true", "false"):
        searched = load_sweep(QUICK, [*only_off, f"baseline.with_audio_self={with_flag}"])
        (memory,) = predict_modes(searched, shape, 1, largest_step(searched, shape))
        found[with_flag] = memory.adapters, most_parameters(searched, shape)
    (with_them, many), (without, few) = found["true"], found["false"]
    new_modules = many - few
    assert new_modules > 0
    # weights, gradients and two moments in float32, and at most a quarter more
    assert 16 * new_modules <= with_them - without <= 1.3 * 16 * new_modules


def test_a_gpu_holds_the_slots_that_fit_beside_the_reserve(config, shape, by_slots, predicted):
    for slots in (1, 2):
        just_enough = int(by_slots[slots].total / (1 - RESERVE)) + 1
        assert slots_on_gpu(config, shape, just_enough) == slots
    assert slots_on_gpu(config, shape, by_slots[1].total) == 0  # the reserve is missing


def test_a_cpu_holds_two_slots_per_core_or_as_many_as_fit_in_memory(
    config, shape, by_slots, predicted
):
    one = by_slots[1]
    assert slots_on_cpu(config, shape, 1 << 40, 3) == 6
    computing = one.total - one.base - one.adapters
    third = (one.base + 3 * one.adapters + computing) / (1 - RESERVE)
    assert slots_on_cpu(config, shape, int(third) + 1, 1) == 2
    second = (one.base + 2 * one.adapters + 2 * computing) / (1 - RESERVE)
    assert slots_on_cpu(config, shape, int(second) + 1, 2) == 2
    assert slots_on_cpu(config, shape, one.base, 2) == 0


def test_the_largest_step_follows_the_limits_of_the_sweep(config, shape):
    roomy = load_sweep(QUICK, ["train.token_budget=100000", "space.batch_clips=[2, 5]"])
    assert largest_step(roomy, shape).num_clips == 5


def test_the_largest_step_can_be_that_of_the_baseline():
    config = load_sweep(QUICK, ["train.token_budget=100000", "baseline.batch_clips=5"])
    assert max(config.space.batch_clips) < 5
    shape = base_shape(config.base, None)
    assert largest_step(config, shape).num_clips == 5
    assert fit(config, None, gpu_gib=80, clip_rows=400)["rows_per_adapter"] == 5 * 400


@pytest.mark.parametrize("max_rows", [37, 60, 100, 128, 200, 256])
def test_no_batch_of_a_sweep_has_more_rows_than_the_largest_step(config, shape, max_rows):
    """Splits every batch of equally long clips, which fill a forward best, as training does."""
    searched = load_sweep(QUICK, [*SMALL, f"data.max_rows={max_rows}", "space.batch_clips=[5]"])
    most = 0
    for rows in range(1, max_rows + 1):
        examples = [SimpleNamespace(num_rows=rows)] * 5
        for part in split_micro_batches(examples, searched.train.token_budget):
            most = max(most, rows * len(part))
    assert largest_step(searched, shape).num_rows == most


def test_one_long_conversation_is_the_largest_step_of_a_small_budget(config, shape):
    clip = config.data.max_frames + config.data.max_text_tokens
    step = largest_step(config, shape)
    assert step.num_clips == 1 and step.num_rows == shape.max_position_embeddings < 2 * clip
    short = load_sweep(QUICK, [*SMALL, "data.max_rows=300"])
    assert (largest_step(short, shape).num_clips, largest_step(short, shape).num_rows) == (1, 300)


@pytest.mark.parametrize("dropout", ["{low: 0, high: 0.1}", "[0, 0.1]"])
def test_dropout_masks_are_counted(config, shape, by_slots, dropout):
    searched = load_sweep(QUICK, [*SMALL, f"space.dropout={dropout}"])
    (with_masks,) = predict_modes(searched, shape, 1, largest_step(searched, shape))
    assert with_masks.activations > by_slots[1].activations
    assert with_masks.adapters == by_slots[1].adapters
