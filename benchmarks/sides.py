"""The two sides that the benchmarks compare, ours and stock, on the same base and labels."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import HiggsAudioV2Config

from higgs_tune.config import ALL_LINEAR, CrossAttention, TrialConfig
from higgs_tune.data.collate import TargetCounts, count_targets, to_device
from higgs_tune.data.tokens import IGNORE, Encoded
from higgs_tune.model.load import Base
from higgs_tune.model.targets import linear_modules, lora_regex
from higgs_tune.train.engine import Engine
from higgs_tune.train.gradients import rows_of
from higgs_tune.train.memory import Memory, StepShape, memory_of_slots, predict
from higgs_tune.train.residents import AdapterState, PackLimits

Step = Callable[[Sequence[Sequence[Encoded]]], Tensor]
"""Trains every adapter for a step on its examples; returns the losses, (K,), still on the device."""


def trial_of(rank: int, num_codebooks: int) -> TrialConfig:
    """All-linear LoRA with the stock loss: the text mean plus the sum of the codebooks' means."""
    return TrialConfig(
        rank=rank,
        alpha=32,
        targets=ALL_LINEAR,
        learning_rate=1e-4,
        num_steps=1_000_000,  # so the learning rate stays constant, as on the stock side
        report_every_steps=100,
        warmup_fraction=0,
        audio_loss_weight=float(num_codebooks),
    )


def prediction(base: Base, rank: int, examples: Sequence[Encoded]) -> Callable[[int], int]:
    """Number of adapters → peak bytes of our step on such examples, as `higgs-tune fit` predicts it.

    `rank` is the largest: `fit` lays out all adapters for it. Each adapter adds the same, so two steps on
    shapes without values are enough; more would keep a GPU machine waiting for minutes.
    """
    config, count = base.model.config, len(examples)
    text_targets = sum(int((e.text_labels_L != IGNORE).sum()) for e in examples)
    audio_rows = sum(len(e.codes_AC) for e in examples)
    shape = StepShape(
        num_clips=count,
        text_rows=round((sum(e.num_rows for e in examples) - audio_rows) / count),
        audio_rows=round(audio_rows / count),
        text_targets=round(text_targets / count),
    )
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    one, two = _predicted(config.to_json_string(), dtype, rank, shape)
    return lambda adapters: memory_of_slots(one, two, adapters).total


@cache  # 15 s at full size, in which a GPU would be idle
def _predicted(config: str, dtype: str, rank: int, shape: StepShape) -> list[Memory]:
    """Memory of a step of one and of two adapters."""
    known = HiggsAudioV2Config.from_dict(json.loads(config))
    modes: list[CrossAttention] = ["off", "off"]
    trial = trial_of(rank, known.num_codebooks)
    return [
        predict(known, dtype, PackLimits.of([trial], num_slots=number), modes[:number], shape)
        for number in (1, 2)
    ]


def start_of(base: Base, rank: int) -> dict[str, Tensor]:
    """Name → an adapter's initial weights: A as in PEFT, B small but not 0, so that LoRA has an effect."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for path in ALL_LINEAR:
        for name, linear in linear_modules(base.model, path).items():
            bound = linear.in_features**-0.5
            a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
            b = torch.empty(linear.out_features, rank).normal_(0, 0.02, generator=generator)
            weights |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return weights


def our_step(base: Base, ranks: Sequence[int], *, split: bool = False) -> Step:
    """The step of a new pack of adapters, as training does it.

    Args:
        base: the base that the adapters share.
        ranks: each adapter's rank.
        split: spread the pack over the cores of a CPU, whole adapters to each, as a sweep does. Host reads in
            other lanes are not counted.
    """
    num_codebooks = base.model.config.num_codebooks
    trials = [trial_of(rank, num_codebooks) for rank in ranks]
    engine = Engine(base, PackLimits.of(trials, num_slots=len(trials)))
    names = [f"adapter {n}" for n in range(len(trials))]
    starts = {rank: start_of(base, rank) for rank in set(ranks)}
    slots = []
    for name, trial in zip(names, trials, strict=True):
        weights = starts[trial.rank]
        zeros = {name: torch.zeros(()).expand(weight.shape) for name, weight in weights.items()}
        slots.append(engine.add(name, trial, AdapterState(0, weights, zeros, zeros)).slot)

    def step(every: Sequence[Sequence[Encoded]]) -> Tensor:
        examples = dict(zip(slots, every, strict=True))
        counts = {slot: count_targets(own, num_codebooks) for slot, own in examples.items()}
        rows = {slot: rows_of([own]) for slot, own in examples.items()}
        groups = engine.lanes.groups(rows) if split else [tuple(rows)]
        tasks = []
        for group in groups:
            own = {slot: (examples[slot], counts[slot]) for slot in group}
            tasks.append(partial(engine.compute, partial(_accumulate, own), group))
        losses: dict[int, Tensor] = {}
        for done in engine.lanes.run(tasks):
            losses |= done
        engine.optim_step(names)
        return torch.stack([losses[slot] for slot in slots])

    return step


def _accumulate(
    own: Mapping[int, tuple[Sequence[Encoded], TargetCounts]], engine: Engine
) -> dict[int, Tensor]:
    """Accumulate the gradients of these slots; returns their losses."""
    batch = engine.batch({slot: examples for slot, (examples, _) in own.items()})
    counts = {slot: count for slot, (_, count) in own.items()}
    text_K, audio_KC = engine.forward_backward(batch, counts)
    text = torch.tensor([counts[slot].text for slot in batch.slots])
    audio = torch.from_numpy(np.stack([counts[slot].audio_C for slot in batch.slots]))
    means_KC = audio_KC / to_device(audio, engine.device)
    loss_K = text_K / to_device(text, engine.device) + means_KC.sum(1)
    return dict(zip(batch.slots, loss_K, strict=True))


def under_autocast(model: nn.Module) -> nn.Module:
    """Change the stock model in place so that it runs under CUDA's autocast.

    There, autocast sums the code embeddings in float32, and the stock forward cannot put that sum among
    bfloat16 rows, because its masked_scatter needs one dtype.
    """
    embedding = model.get_submodule("model.embed_audio_tokens")
    dtype = embedding.get_parameter("embed_audio_tokens.weight").dtype
    embedding.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
    return model


def stock_step(base: Base, rank: int) -> Step:
    """The step of one adapter with transformers and PEFT as usually run, on the same frozen tensors.

    On a bf16 base that is PEFT's default: fp32 adapters under autocast. The adapter has the same initial
    weights as ours.
    """
    shared = {id(tensor): tensor for tensor in base.model.parameters()}
    config = LoraConfig(r=rank, lora_alpha=32, target_modules=lora_regex(ALL_LINEAR))
    model = get_peft_model(under_autocast(copy.deepcopy(base.model, shared)), config).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = start_of(base, rank)
    with torch.no_grad():
        for name, parameter in trained.items():
            plain = name.removeprefix("base_model.model.").replace(".default.", ".")
            parameter.copy_(start[plain])
    device = next(base.model.parameters()).device
    half = next(base.model.parameters()).dtype == torch.bfloat16
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)

    def step(examples: Sequence[Sequence[Encoded]]) -> Tensor:
        inputs = stock_inputs(examples[0], base.model.config.num_codebooks)
        inputs = {name: to_device(tensor, device) for name, tensor in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()[None]

    return step


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stock_inputs(examples: Sequence[Encoded], num_codebooks: int) -> dict[str, Tensor]:
    """Right-padded arguments of the stock forward, with unshifted labels, as it expects them."""
    longest = max(e.num_rows for e in examples)
    most = max(1, *(len(e.codes_AC) for e in examples))
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    labels = np.full_like(ids, -100)
    codes = np.zeros((len(examples), most, num_codebooks), dtype=np.int64)
    audio_labels = np.full_like(codes, -100)
    mask = np.zeros((len(examples), most), dtype=bool)
    for n, e in enumerate(examples):
        ids[n, : e.num_rows] = e.ids_L
        labels[n, 1 : e.num_rows] = e.text_labels_L[:-1]
        codes[n, : len(e.codes_AC)] = e.codes_AC
        audio_labels[n, 1 : len(e.codes_AC)] = e.audio_labels_AC[:-1]
        mask[n, : len(e.codes_AC)] = True
    arrays = {
        "input_ids": ids,
        "labels": labels,
        "audio_input_ids": codes,
        "audio_labels": audio_labels,
        "audio_input_ids_mask": mask,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
