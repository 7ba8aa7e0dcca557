"""The bank's bookkeeping, without training."""

import pytest
import torch

from higgs_tune.model.packed_lora import AdapterBank

GROUPS = [("attention", {"one": torch.nn.Linear(5, 3, bias=False)})]


def bank_of(num_slots):
    return AdapterBank(GROUPS, num_slots, 2, torch.float32, torch.device("cpu"))


def test_a_slot_that_cannot_be_laid_out_stays_free():
    bank = bank_of(1)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        bank.seat(0, 2, 1.0, ("attention",), dropout=1.0)
    assert not bank.seats
    bank.seat(0, 2, 1.0, ("attention",))
    assert bank.seats[0].rank == 2


def test_a_lane_gets_its_pack_although_another_lane_clears_the_caches():
    class Forgotten(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    bank = bank_of(2)
    for slot in range(2):
        bank.seat(slot, 2, 1.0, ("attention",))
    bank._packs, bank._factors = Forgotten(), Forgotten()
    (run,) = bank.pack((1,)).runs(GROUPS[0][1])
    assert run.rows == 0 and run.factors.a_krD.shape == (2, 5)
