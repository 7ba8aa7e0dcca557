"""AdamW over a bank whose every row has its own rate, step count, clip and health.

Shape letters: K slots, P columns.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from higgs_tune.model.packed_lora import AdapterBank

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


def learning_rate_factor(
    step: int, num_steps: int, warmup_fraction: float, min_lr_fraction: float
) -> float:
    """Linear warm-up, then cosine down to `min_lr_fraction`, as a share of the peak rate.

    Depends on nothing but the step and the full budget, so an early stop changes no rate.

    Args:
        step: 0-based step about to be done.
    """
    num_warmup = round(warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min_lr_fraction + (1 - min_lr_fraction) * cosine


@dataclass(frozen=True)
class RowStep:
    """What one slot does in this optimizer step."""

    learning_rate: float
    new_module_learning_rate: float
    weight_decay: float
    clip_norm: float
    step: int  # 1-based, for the bias correction


def adamw_step(bank: AdapterBank, rows: dict[int, RowStep], alive_K: Tensor) -> Tensor:
    """Clip and step the given rows, clear all gradients, and mark rows with a non-finite gradient.

    A dead row, and a row not in `rows`, keeps its weights and moments exactly. Nothing waits for the
    device.

    Args:
        rows: slot → its settings; other slots rest.
        alive_K: bool, updated in place; a row that dies stays dead.

    Returns:
        Gradient norms before clipping, float32 (K,).

    Source: Loshchilov and Hutter 2019 (AdamW); parity with torch.optim.AdamW is tested.
    """
    device = bank.master_KP.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)[:, None]

    settings = [rows.get(slot) for slot in range(bank.num_slots)]
    steps = [s.step if s else 1 for s in settings]
    clip_K1 = column([s.clip_norm if s else 1.0 for s in settings])
    rates = {
        "lora": column([s.learning_rate if s else 0.0 for s in settings]),
        "new": column([s.new_module_learning_rate if s else 0.0 for s in settings]),
    }
    decay_K1 = column([s.weight_decay if s else 0.0 for s in settings])
    correction_1 = column([1 - BETA_1**step for step in steps])
    correction_2 = column([1 - BETA_2**step for step in steps])
    active_K1 = column([float(s is not None) for s in settings]).bool()

    grad_KP = bank.take_gradients()
    norm_K1 = torch.linalg.vector_norm(grad_KP, dim=1, keepdim=True)
    alive_K.logical_and_((torch.isfinite(norm_K1) | ~active_K1).squeeze(1))
    moves_K1 = alive_K[:, None] & active_K1
    scale_K1 = (clip_K1 / (norm_K1 + 1e-6)).clamp(max=1.0)
    grad_KP = torch.where(moves_K1, grad_KP * scale_K1, 0.0)
    moves = moves_K1.float()
    bank.exp_avg_KP.lerp_(grad_KP, (1 - BETA_1) * moves)
    bank.exp_avg_sq_KP.lerp_(grad_KP.square_(), (1 - BETA_2) * moves)
    for kind, rate_K1 in rates.items():
        for columns in bank.columns(kind=kind):
            master = bank.master_KP[:, columns]
            denominator = (bank.exp_avg_sq_KP[:, columns] / correction_2).sqrt_().add_(EPS)
            step_size = rate_K1 * moves
            master.mul_(1 - step_size * decay_K1)
            master.sub_(bank.exp_avg_KP[:, columns] / correction_1 / denominator * step_size)
    bank.refresh_compute()
    bank.grad_KP.zero_()
    return norm_K1.squeeze(1)
