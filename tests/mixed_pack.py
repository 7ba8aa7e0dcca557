"""A pack of trials that differ in everything, and how to train it step by step."""

import torch

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.collate import count_targets
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from tests.models import example, tiny_base, trial

TRIALS = {
    "plain": trial(seed=1),
    "small": trial(seed=2, rank=2, alpha=32.0, targets=("attention",), learning_rate=3e-2),
    "heads": trial(
        seed=3, rank=8, targets=("text_mlp", "text_head", "audio_head"), weight_decay=0.1
    ),
    "audio_self": trial(
        seed=4, cross_attention="audio_self", targets=("audio_mlp", "audio_attention")
    ),
    "text_to_audio": trial(
        seed=5,
        cross_attention="text_to_audio",
        targets=(*ALL_LINEAR, "audio_attention"),
        new_module_lr_factor=0.5,
        audio_loss_weight=0.3,
    ),
}
LIMITS = PackLimits.of(list(TRIALS.values()), num_slots=len(TRIALS))


def examples_of(trial_id, step):
    """Ragged examples that depend on trial and step; "small" never sees audio targets."""
    seed = 1000 * list(TRIALS).index(trial_id) + 10 * step
    tasks = ("transcribe",) * 3 if trial_id == "small" else ("transcribe", "speak", "clone")
    count = 2 + (seed // 10) % 2
    return [
        example(task, seed + n, num_frames=4 + (seed + 3 * n) % 9, num_letters=2 + (seed + n) % 7)
        for n, task in enumerate(tasks[:count])
    ]


def train(engine, trial_ids, steps, poison=None):
    """Train residents together; returns losses per trial and step."""
    losses = {trial_id: [] for trial_id in trial_ids}
    for step in steps:
        slots = {engine.residents[t].slot: t for t in trial_ids}
        examples = {slot: examples_of(t, step) for slot, t in slots.items()}
        counts = {slot: count_targets(e, 4) for slot, e in examples.items()}
        batch = engine.batch(examples)
        text_K, audio_KC = engine.forward_backward(batch, counts)
        for k, slot in enumerate(batch.slots):
            losses[slots[slot]].append(torch.cat([text_K[k : k + 1], audio_KC[k]]))
        if poison == step:
            engine.bank.lora.grad[engine.residents["small"].slot, 3] = float("nan")
        engine.optim_step(trial_ids)
    return {t: torch.stack(values) for t, values in losses.items()}


def engine_of(share, *trial_ids, base=None):
    engine = Engine(base or tiny_base(), LIMITS, share_matmuls=share)
    for trial_id in trial_ids:
        engine.add(trial_id, TRIALS[trial_id])
    return engine
