"""Predicted memory against the peak of torch's own allocator in a real step."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import ALL_LINEAR, CrossAttention
from higgs_tune.model.load import Base
from higgs_tune.train import memory
from higgs_tune.train.engine import Engine
from higgs_tune.train.memory import (
    Memory,
    StepShape,
    fill_slots,
    memory_of_slots,
    predict,
    run_fake,
    run_step,
    slots_that_fit,
)
from higgs_tune.train.residents import PackLimits

FULL_SIZE = HiggsAudioV2Config(codebook_size=1026)


def small_config(num_layers: int = 2, vocab_size: int = 500) -> HiggsAudioV2Config:
    return HiggsAudioV2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_codebooks=4,
        codebook_size=66,
        audio_stream_bos_id=64,
        audio_stream_eos_id=65,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        audio_token_id=3,
        audio_bos_token_id=4,
        audio_delay_token_id=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def measured_peak(run) -> int:
    """The CPU allocator's peak during `run()`, in bytes above its start."""
    gc.collect()  # an earlier engine's garbage must not be freed, and counted, during the run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 0
    return peak


CASES = {
    "one": ({}, {}),
    "rank 64": ({"max_rank": 64}, {}),
    "attention only": ({"paths": frozenset({"attention"})}, {}),
    "with heads": ({"paths": frozenset({*ALL_LINEAR, "text_head", "audio_head"})}, {}),
    "pack of 3": ({"num_slots": 3}, {}),
    "long clips": ({}, {"num_clips": 2, "text_rows": 25, "audio_rows": 125}),
    "many targets": ({}, {"text_rows": 25, "text_targets": 22}),
    "accumulated": ({"num_slots": 2}, {"num_micro_batches": 3}),
    "audio self": (
        {
            "paths": frozenset({*ALL_LINEAR, "audio_attention"}),
            "num_slots": 2,
        },
        {},
    ),
}


CROSS = {"audio self": ["audio_self", "off"]}
# Parts with dtypes of their own in these: the bank, the heads' logits, sums, modules saved whole.
FLOAT32 = ("one", "with heads", "accumulated", "audio self")


def limits_of(case: str) -> PackLimits:
    settings = {"num_slots": 1, "max_rank": 16, "paths": frozenset(ALL_LINEAR)} | CASES[case][0]
    return PackLimits(**settings)


@pytest.mark.parametrize(
    "case, dtype",
    [*((case, "bfloat16") for case in CASES), *((case, "float32") for case in FLOAT32)],
)
def test_prediction_is_within_a_tenth_of_the_allocators_peak(case: str, dtype: str) -> None:
    config, limits = small_config(), limits_of(case)
    step = replace(
        StepShape(num_clips=4, text_rows=10, audio_rows=40, text_targets=5), **CASES[case][1]
    )
    modes = CROSS.get(case, ["off"] * limits.num_slots)
    predicted = predict(config, dtype, limits, modes, step)
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    model = model.to(getattr(torch, dtype)).requires_grad_(False).eval()
    base = Base(model, None, None, "small")  # type: ignore[arg-type]

    def run(step: StepShape = step) -> None:
        engine = Engine(base, limits)
        run_step(engine, fill_slots(engine, modes), step)

    run(StepShape(1, text_rows=4, audio_rows=8, text_targets=2))  # allocates one-time buffers
    peak = measured_peak(run)
    assert predicted.total - predicted.base == pytest.approx(peak, rel=0.1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert predicted.base == pytest.approx(weights, rel=0.001)


@pytest.mark.parametrize(
    "case, rows",
    [("with heads", 1), ("with heads", 40), ("audio self", 40)],  # the bank's peak, and the rows'
)
def test_extrapolation_from_few_layers_equals_the_whole_model(
    case: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, limits = small_config(num_layers=7), limits_of(case)
    step = StepShape(num_clips=2, text_rows=2 * rows, audio_rows=rows, text_targets=rows)
    modes = CROSS.get(case, ["off"] * limits.num_slots)
    whole = run_fake(config, "bfloat16", limits, modes, step)
    depths = []

    def noted(config: HiggsAudioV2Config, *settings: Any) -> Memory:
        depths.append(config.num_hidden_layers)
        return run_fake(config, *settings)

    monkeypatch.setattr(memory, "run_fake", noted)
    assert predict(config, "bfloat16", limits, modes, step) == whole
    assert depths == [1, 2, 3]  # so it was extrapolated


@pytest.mark.parametrize(
    "bent, depths",
    [
        (lambda n: Memory(10, n, 5 * n, 0, 7), [1, 2, 3]),
        (lambda n: Memory(10, n, n * n, 0, 7), [1, 2, 3, 9]),
        (lambda n: Memory(10, n, 5 * n, 0, 40 - 2 * n), [1, 2, 3, 9]),  # the peak may move
    ],
)
def test_a_model_that_does_not_grow_linearly_is_run_whole(
    bent: Callable[[int], Memory], depths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def made_up(config: HiggsAudioV2Config, *settings: Any) -> Memory:
        ran.append(config.num_hidden_layers)
        return bent(config.num_hidden_layers)

    monkeypatch.setattr(memory, "run_fake", made_up)
    step = StepShape(num_clips=1, text_rows=2, audio_rows=1, text_targets=1)
    found = predict(small_config(9), "bfloat16", limits_of("one"), ["off"], step)
    assert (found, ran) == (bent(9), depths)


@pytest.mark.parametrize("rows", [1, 40])  # the optimizer's peak, and the backward's
def test_extrapolation_from_two_slots_equals_the_prediction_for_five(rows: int) -> None:
    step = StepShape(2, text_rows=2 * rows, audio_rows=rows, text_targets=rows, num_micro_batches=2)

    def of(num_slots: int) -> Memory:
        limits = PackLimits(
            num_slots, max_rank=16, paths=frozenset({*ALL_LINEAR, "text_head", "audio_attention"})
        )
        modes: list[CrossAttention] = ["audio_self", *["off"] * (num_slots - 1)]
        return predict(small_config(1), "bfloat16", limits, modes, step, dropout=0.1)

    assert memory_of_slots(of(1), of(2), 5) == of(5)


def test_full_size_has_the_published_parameter_count_and_the_adapter_size_it_implies() -> None:
    limits = PackLimits(num_slots=1, max_rank=16, paths=frozenset(ALL_LINEAR))
    found = predict(FULL_SIZE, "bfloat16", limits, ["off"], StepShape.of(8, 400, 4096))
    assert found.base == pytest.approx(2 * 5.7713e9, rel=1e-3)
    # 2.466 M parameters per unit of rank: master, two moments in fp32; compute, gradient in bf16
    assert found.adapters == pytest.approx(16 * 2.4658e6 * 16, rel=1e-3)
    assert found.total < 24 * (1 << 30)


def test_slots_that_fit_counts_the_base_once() -> None:
    ones, twos = ([Memory(10, 2 * k, 3 * k, 0, 0)] for k in (1, 2))
    found = [slots_that_fit(ones, twos, room) for room in (15, 16, 21, 22, 100)]
    assert found == [0, 1, 1, 2, 17]
    # another kind, with a larger base and smaller slots
    ones.append(Memory(12, 0, 1, 0, 0))
    twos.append(Memory(12, 0, 2, 0, 0))
    found = [slots_that_fit(ones, twos, room) for room in (13, 15, 16, 100)]
    assert found == [0, 0, 1, 17]
