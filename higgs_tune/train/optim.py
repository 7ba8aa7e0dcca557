"""AdamW over a bank whose rows each have their own rate, step count, clipping and health.

Shape letters: K slots.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from higgs_tune.config import TrialConfig
from higgs_tune.model.packed_lora import AdapterBank

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


def learning_rate_factor(
    step: int, num_steps: int, warmup_fraction: float, min_lr_fraction: float
) -> float:
    """Linear warm-up, then cosine down to `min_lr_fraction`, as a share of the peak rate.

    Depends only on the step and the full budget, so an early stop changes no rate.

    Args:
        step: 0-based index of the step about to be done.
    """
    num_warmup = round(warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min_lr_fraction + (1 - min_lr_fraction) * cosine


def learning_rate(config: TrialConfig, step: int) -> float:
    """The learning rate of a trial's 0-based step."""
    return config.rates_at(step)["learning_rate"] * learning_rate_factor(
        step, config.num_steps, config.warmup_fraction, config.min_lr_fraction
    )


@dataclass(frozen=True)
class RowStep:
    """One slot's settings for this optimizer step."""

    learning_rate: float
    new_module_learning_rate: float
    weight_decay: float
    clip_norm: float
    step: int  # 1-based, for the bias correction


def adamw_step(bank: AdapterBank, rows: dict[int, RowStep], alive_K: Tensor) -> Tensor:
    """Clip and step the given rows, clear all gradients, and mark rows with a non-finite gradient dead.

    Dead rows, and rows not in `rows`, keep their weights and moments exactly. Does not wait for the
    device.

    Args:
        rows: slot → its settings; other slots are not stepped.
        alive_K: bool, updated in place; a row that dies stays dead.

    Returns:
        Gradient norms before clipping, float32 (K,); 0 for slots not in `rows`.

    Source: Loshchilov and Hutter 2019 (AdamW); parity with torch.optim.AdamW is tested.
    """
    norm_K = torch.zeros(bank.num_slots, device=alive_K.device)
    for slot, row in rows.items():
        parts = bank.seats[slot].parts
        gradients = [part.storage.gradient(part.where) for part in parts]
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        norm_K[slot] = norm
        alive_K[slot] &= torch.isfinite(norm)
        clip = ((norm + 1e-6) / row.clip_norm).clamp(min=1.0)
        step = torch.full((), float(row.step), device=norm.device)
        for kind, rate in (("lora", row.learning_rate), ("new", row.new_module_learning_rate)):
            chosen = [n for n, part in enumerate(parts) if part.kind == kind]
            if not chosen:
                continue
            # torch.optim.AdamW(fused=True) calls this: one pass over memory instead of a dozen. The
            # optimizer class itself would add a host sync for a row that must not change.
            torch.ops.aten._fused_adamw_(
                [parts[n].storage.master[parts[n].where] for n in chosen],
                [gradients[n] for n in chosen],
                [parts[n].storage.exp_avg[parts[n].where] for n in chosen],
                [parts[n].storage.exp_avg_sq[parts[n].where] for n in chosen],
                [],
                [step] * len(chosen),
                lr=rate,
                beta1=BETA_1,
                beta2=BETA_2,
                weight_decay=row.weight_decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=clip,  # gradients are divided by it
                found_inf=(~alive_K[slot]).float(),  # 1 skips the update
            )
        del gradients  # frees the float32 copies before the next slot's
    bank.refresh_compute()
    bank.clear_gradients(bank.seats)
    return norm_K
