"""Counting a pack's operations, which needs no GPU."""

import pack_ops
import torch
from random_base import PRESETS, random_base
from torch import nn

META = torch.device("meta")


def counted(act):
    with pack_ops.Operations() as operations:
        act()
    return operations.count


def test_operations_that_compute_are_counted_and_views_are_not():
    x = torch.zeros(4, 6, device=META)
    assert counted(lambda: (x @ x.mT).relu_()) == 2
    assert counted(lambda: x.view(2, 12).split(6, 1)) == 0
    assert counted(lambda: torch.empty_like(x).copy_(x)) == 1
    linear = nn.Linear(6, 3, bias=False, device=META)
    assert counted(lambda: linear(x.requires_grad_()).sum().backward()) > 4


def test_with_shared_matmuls_an_adapter_adds_few_operations():
    base = random_base(PRESETS["small"], META, torch.bfloat16)
    counts = {
        (unlike, share, adapters): pack_ops.count(
            base, pack_ops.trials_of(adapters, unlike=unlike), 60, share=share
        )
        for unlike in (False, True)
        for share in (False, True)
        for adapters in (4, 8)
    }
    # each adapter has its own optimizer step: some 30 operations, more with several targets
    for unlike in (False, True):
        assert counts[unlike, True, 8] - counts[unlike, True, 4] < 4 * 50
        assert counts[unlike, False, 8] - counts[unlike, False, 4] > 4 * 150
    # ranks up to 64 are in two classes, so unlike ones take one run more than equal ones; more targets, too
    of_a_run = (counts[False, False, 8] - counts[False, True, 8]) / 7
    assert counts[True, True, 8] - counts[False, True, 8] < of_a_run + 8 * 10
    assert len(pack_ops.picture([{"adapters": 1, **dict.fromkeys(NAMES, 2)}]).axes) == 1


NAMES = ("unlike_apart", "unlike_shared", "alike_shared")
