"""The bank's optimizer against torch's."""

import pytest
import torch

from higgs_tune.model.packed_lora import AdapterBank, Entry
from higgs_tune.train.optim import RowStep, adamw_step, learning_rate_factor

ENTRIES = [Entry("a", (3, 5), "attention", "lora"), Entry("b", (4,), "audio_attention", "new")]


def bank_of(num_slots):
    bank = AdapterBank(ENTRIES, num_slots, torch.float32, torch.device("cpu"))
    for leaf in bank.leaves.values():
        leaf.data.normal_(generator=torch.Generator().manual_seed(0))
    return bank


def test_rows_match_torch_adamw_with_their_own_settings():
    bank = bank_of(2)
    alive = torch.ones(2, dtype=torch.bool)
    rates, decays, clips = (1e-2, 3e-3), (0.0, 0.2), (0.1, 5.0)
    reference = []
    for slot in range(2):
        lora = bank.leaves["a"][slot].detach().clone().requires_grad_()
        new = bank.leaves["b"][slot].detach().clone().requires_grad_()
        groups = [{"params": [lora]}, {"params": [new], "lr": 0.1 * rates[slot]}]
        optimizer = torch.optim.AdamW(groups, lr=rates[slot], weight_decay=decays[slot])
        reference.append((lora, new, optimizer))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        for slot, (lora, new, optimizer) in enumerate(reference):
            lora.grad = torch.randn(3, 5, generator=generator)
            new.grad = torch.randn(4, generator=generator)
            bank.view(bank.grad_KP, "a")[slot].copy_(lora.grad)
            bank.view(bank.grad_KP, "b")[slot].copy_(new.grad)
            torch.nn.utils.clip_grad_norm_([lora, new], clips[slot])
            optimizer.step()
        rows = {
            slot: RowStep(rates[slot], 0.1 * rates[slot], decays[slot], clips[slot], step)
            for slot in range(2)
        }
        adamw_step(bank, rows, alive)
    for slot, (lora, new, _) in enumerate(reference):
        torch.testing.assert_close(bank.leaves["a"][slot], lora, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bank.leaves["b"][slot], new, rtol=1e-5, atol=1e-6)


def test_a_row_that_rests_or_died_keeps_weights_and_moments():
    bank = bank_of(3)
    alive = torch.ones(3, dtype=torch.bool)
    row = RowStep(1e-2, 1e-3, 0.1, 1.0, 1)
    bank.grad_KP.normal_()
    adamw_step(bank, dict.fromkeys(range(3), row), alive)
    before = [b.clone() for b in (bank.master_KP, bank.exp_avg_KP, bank.exp_avg_sq_KP)]
    bank.grad_KP.normal_()
    bank.grad_KP[1, 2] = float("inf")
    adamw_step(bank, {0: row, 1: row}, alive)
    assert alive.tolist() == [True, False, True]
    after = (bank.master_KP, bank.exp_avg_KP, bank.exp_avg_sq_KP)
    for old, new in zip(before, after, strict=True):
        assert not torch.equal(old[0], new[0])
        assert torch.equal(old[1:], new[1:])
    bank.grad_KP.normal_()
    adamw_step(bank, {1: row}, alive)
    assert alive.tolist() == [True, False, True]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 1.0), (10, 1.0), (100, 0.2), (55, 0.6)])
def test_schedule_warms_up_then_follows_a_cosine(step, factor):
    assert learning_rate_factor(step, 100, 0.1, 0.2) == pytest.approx(factor)
