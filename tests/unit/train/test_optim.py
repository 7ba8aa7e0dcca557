"""The bank's optimizer against torch's AdamW."""

import pytest
import torch

from higgs_tune.model.packed_lora import AdapterBank
from higgs_tune.train.optim import RowStep, adamw_step, learning_rate_factor

LINEAR = torch.nn.Linear(5, 3, bias=False)
GROUPS = [("attention", {"one": LINEAR})]
NEW = [("b", (4,), "audio_attention")]


def bank_of(num_slots):
    bank = AdapterBank(GROUPS, num_slots, 2, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for slot in range(num_slots):
        bank.seat(slot, 2, 1.0, ("attention", "audio_attention"), NEW)
        for view in bank.views(slot, "master").values():
            view.normal_(generator=generator)
    return bank


def test_rows_match_torch_adamw_with_their_own_settings():
    bank = bank_of(2)
    alive = torch.ones(2, dtype=torch.bool)
    rates, decays, clips = (1e-2, 3e-3), (0.0, 0.2), (0.1, 5.0)
    reference = []
    for slot in range(2):
        own = {name: v.clone().requires_grad_() for name, v in bank.views(slot, "master").items()}
        lora = [own["one.lora_A.weight"], own["one.lora_B.weight"]]
        groups = [{"params": lora}, {"params": [own["b"]], "lr": 0.1 * rates[slot]}]
        optimizer = torch.optim.AdamW(groups, lr=rates[slot], weight_decay=decays[slot])
        reference.append((own, optimizer))
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        for slot, (own, optimizer) in enumerate(reference):
            for name, view in bank.views(slot, "grad").items():
                own[name].grad = torch.randn(view.shape, generator=generator)
                view.copy_(own[name].grad)
            torch.nn.utils.clip_grad_norm_(own.values(), clips[slot])
            optimizer.step()
        rows = {
            slot: RowStep(rates[slot], 0.1 * rates[slot], decays[slot], clips[slot], step)
            for slot in range(2)
        }
        adamw_step(bank, rows, alive)
    for slot, (own, _) in enumerate(reference):
        for name, view in bank.views(slot, "master").items():
            torch.testing.assert_close(view, own[name].detach(), rtol=1e-5, atol=1e-6)


def test_an_idle_or_diverged_row_keeps_its_weights_and_moments():
    bank = bank_of(3)
    alive = torch.ones(3, dtype=torch.bool)
    row = RowStep(1e-2, 1e-3, 0.1, 1.0, 1)

    def some_gradients():
        for slot in range(3):
            for view in bank.views(slot, "grad").values():
                view.normal_()

    def everything():
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return [
            [v.clone() for kind in kinds for v in bank.views(slot, kind).values()]
            for slot in range(3)
        ]

    some_gradients()
    adamw_step(bank, dict.fromkeys(range(3), row), alive)
    before = everything()
    some_gradients()
    bank.views(1, "grad")["b"][2] = float("inf")
    adamw_step(bank, {0: row, 1: row}, alive)
    assert alive.tolist() == [True, False, True]
    after = everything()
    assert not any(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    for slot in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(before[slot], after[slot], strict=True))
    assert not any(view.any() for slot in range(3) for view in bank.views(slot, "grad").values())
    some_gradients()
    adamw_step(bank, {1: row}, alive)
    assert alive.tolist() == [True, False, True]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.1), (9, 1.0), (10, 1.0), (100, 0.2), (55, 0.6)])
def test_schedule_warms_up_then_follows_a_cosine(step, factor):
    assert learning_rate_factor(step, 100, 0.1, 0.2) == pytest.approx(factor)
