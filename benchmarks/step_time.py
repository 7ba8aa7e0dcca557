"""Time of one optimizer step: ours (a pack of one) against stock transformers + PEFT.

    python benchmarks/step_time.py [--clips 8] [--repeats 15] [--out benchmarks/results/step_time.json]

Same base, same clips, same labels, AdamW on both sides; both adapters start as the identity, with
their own random A. The two alternate in one process, and the figure is the ratio of medians. Losses are
compared first: a faster step that computes something else would be no result.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from higgs_tune.config import ALL_LINEAR, BaseSettings, TaskMix, TrialConfig
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded, encode_conversation
from higgs_tune.model.load import load_base
from higgs_tune.model.targets import lora_regex
from higgs_tune.train.engine import Engine, PackLimits


def stock_inputs(examples: list[Encoded], num_codebooks: int) -> dict[str, torch.Tensor]:
    """Right-padded arguments of the stock forward with labels at their own inputs, as it wants them."""
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


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = load_base(BaseSettings())
    num_codebooks = base.model.config.num_codebooks
    order = TrainOrder(Dataset.open("embedded:arabic"), TaskMix(), args.clips, seed=0)
    batches = [
        [encode_conversation(c, base.vocabulary) for c in order.batch(step)]
        for step in range(args.repeats + 2)
    ]
    trial = TrialConfig(
        rank=args.rank,
        alpha=32,
        targets=ALL_LINEAR,
        learning_rate=1e-4,
        num_steps=10_000,
        report_every_steps=100,
        audio_loss_weight=float(num_codebooks),  # the stock loss sums the codebooks' means
    )
    engine = Engine(base, PackLimits.of([trial], num_slots=1))
    engine.add("a", trial)
    stock = get_peft_model(
        copy.deepcopy(base.model),
        LoraConfig(r=args.rank, lora_alpha=32, target_modules=lora_regex(ALL_LINEAR)),
    ).train()
    optimizer = torch.optim.AdamW(
        [p for p in stock.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0
    )

    def our_step(examples: list[Encoded]) -> float:
        counts = count_targets(examples, num_codebooks)
        text_K, audio_KC = engine.forward_backward(
            collate({0: examples}).to(engine.device), {0: counts}
        )
        engine.optim_step(["a"])
        audio = (audio_KC[0].cpu() / torch.from_numpy(counts.audio_C)).sum()
        return float(text_K[0] / counts.text + audio)

    def stock_step(examples: list[Encoded]) -> float:
        inputs = stock_inputs(examples, num_codebooks)
        inputs = {name: tensor.to(engine.device) for name, tensor in inputs.items()}
        loss = stock(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def synchronise() -> None:
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)

    batches = [b for b in batches if count_targets(b, num_codebooks).text]
    batches = [b for b in batches if count_targets(b, num_codebooks).audio_C.all()]
    first = (our_step(batches[0]), stock_step(batches[0]))
    # step 0: the adapters are still the identity, so both are the base's loss
    assert abs(first[0] - first[1]) < 1e-3 * abs(first[1]), first
    times: dict[str, list[float]] = {"ours": [], "stock": []}
    for examples in batches[1:]:
        for name, step in (("ours", our_step), ("stock", stock_step)):
            synchronise()
            started = time.perf_counter()
            step(examples)
            synchronise()
            times[name].append(time.perf_counter() - started)
    ours, theirs = (statistics.median(times[name]) for name in ("ours", "stock"))
    result = {
        "ours_s": round(ours, 4),
        "stock_s": round(theirs, 4),
        "ratio": round(theirs / ours, 2),
        "clips": args.clips,
        "rows_per_step": round(statistics.mean(sum(e.num_rows for e in b) for b in batches)),
        "repeats": len(times["ours"]),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
