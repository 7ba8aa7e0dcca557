"""How many of a sweep's trials a worker can hold, from the memory model and the free memory."""

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch

from higgs_tune.config import CrossAttention, SweepConfig
from higgs_tune.config_space import highest
from higgs_tune.data.tasks import longest_conversation
from higgs_tune.model.targets import account
from higgs_tune.train.memory import (
    RESERVE,
    Memory,
    StepShape,
    empty_model,
    largest_trial,
    predict,
    slots_that_fit,
)
from higgs_tune.train.sweep_pack import sweep_limits

if TYPE_CHECKING:
    from transformers import HiggsAudioV2Config

SLOTS_PER_CPU = 2  # keeps a CPU's lanes busy when trials differ in length


def most_clips(config: SweepConfig) -> int:
    """Most clips per step of any trial of the sweep, the two baselines included."""
    return max(*config.space.batch_clips, config.baseline.batch_clips or 1)


def largest_step(config: SweepConfig, shape: "HiggsAudioV2Config") -> StepShape:
    """The step with the most rows in one forward that the sweep's limits allow an adapter, for speech data.

    Assumes that a fifth of the rows is text, and half of that targets; denser text needs more memory
    for its logits.
    """
    data, clips = config.data, most_clips(config)
    longest = longest_conversation(data, shape.num_codebooks, shape.max_position_embeddings)
    # one conversation may exceed the budget; several fill it best with an equal share each
    budget = config.train.token_budget
    lengths = {min(longest, max(1, budget // number)) for number in range(1, clips + 1)}
    steps = (StepShape.of(clips, rows, budget) for rows in {*lengths, longest})
    return max(steps, key=lambda step: (step.num_rows, step.num_clips))


def predict_modes(
    config: SweepConfig, shape: "HiggsAudioV2Config", num_slots: int, step: StepShape
) -> list[Memory]:
    """Predicted memory of the sweep's largest trials, for each of its cross_attention modes."""
    dropout = highest(config.space.dropout)
    limits = sweep_limits(config, num_slots)

    @cache
    def memory_of(modes: tuple[CrossAttention, ...]) -> Memory:
        return predict(shape, config.base.dtype, limits, modes, step, dropout)

    # the second baseline (audio_self) runs beside the other trials
    with_flag: CrossAttention = "audio_self" if config.baseline.with_audio_self else "off"
    return [
        memory_of((with_flag if mode == "off" else mode, *[mode] * (num_slots - 1)))
        for mode in config.space.cross_attention
    ]


def most_parameters(config: SweepConfig, shape: "HiggsAudioV2Config") -> int:
    """Number of trainable parameters of the sweep's largest trial."""
    limits = sweep_limits(config, num_slots=1)
    with torch.device("meta"):
        model = empty_model(shape, torch.float32)
    trials = (largest_trial(limits, mode) for mode in config.cross_attention_modes)
    return max(account(model, trial)["parameters"] for trial in trials)


def largest(memories: Iterable[Memory]) -> Memory:
    """The entry with the largest total."""
    return max(memories, key=lambda memory: memory.total)


def slots_on_gpu(config: SweepConfig, shape: "HiggsAudioV2Config", free_bytes: int) -> int:
    """How many trials fit side by side in a GPU's free memory; 0 if not even one does."""
    ones, twos = (predict_modes(config, shape, n, largest_step(config, shape)) for n in (1, 2))
    return slots_that_fit(ones, twos, free_bytes)


def slots_on_cpu(
    config: SweepConfig, shape: "HiggsAudioV2Config", free_bytes: int, num_cpus: int
) -> int:
    """Two slots per CPU, or as many as fit in memory if that is fewer; 0 if not even one fits.

    Every slot holds an adapter, but only as many adapters as there are CPUs hold activations.
    """
    one = largest(predict_modes(config, shape, 1, largest_step(config, shape)))
    room = free_bytes * (1 - RESERVE) - one.base
    computing = one.total - one.base - one.adapters
    for slots in range(SLOTS_PER_CPU * num_cpus, 0, -1):
        if slots * one.adapters + min(slots, num_cpus) * computing <= room:
            return slots
    return 0
