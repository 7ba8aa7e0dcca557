"""Which adapters share a forward: arithmetic that only pads against time of the host."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from random_base import PRESETS, random_base

from higgs_tune.train.forwards import Costs, share_forwards
from tests.models import tiny_base
from tests.packs import TRIALS, loop_of, same

COSTS = Costs(forward=1000.0, run=100.0)


def cost(groups, rows, costs):
    """Written anew: padded rows of each forward, or what the host needs for it."""
    total = 0.0
    for group in groups:
        text, audio = (max(rows[slot][n] for slot in group) for n in range(2))
        runs = len(group) - sum(slot + 1 in group for slot in group)
        total += max(len(group) * (text + audio), costs.forward + runs * costs.run)
    return total


def every_cut(slots):
    """All ways to cut a list into stretches."""
    for number in range(len(slots)):
        for cuts in combinations(range(1, len(slots)), number):
            edges = [0, *cuts, len(slots)]
            yield [tuple(slots[a:b]) for a, b in pairwise(edges)]


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_by_length_takes_less(seed):
    rng = np.random.default_rng(seed)
    rows = {int(n): tuple(map(int, rng.integers(10, 1500, 2))) for n in rng.permutation(9)[:6]}
    groups = share_forwards(rows, COSTS)
    assert sorted(slot for group in groups for slot in group) == sorted(rows)
    assert all(group == tuple(sorted(group)) for group in groups)
    by_length = sorted(rows, key=lambda slot: -sum(rows[slot]))
    least = min(cost(way, rows, COSTS) for way in every_cut(by_length))
    assert cost(groups, rows, COSTS) == pytest.approx(least)


def test_equal_adapters_and_short_steps_share_one_forward():
    assert share_forwards(dict.fromkeys(range(8), (90, 510)), COSTS) == [tuple(range(8))]
    assert share_forwards({0: (5, 9), 1: (50, 90), 2: (90, 300)}, COSTS) == [(0, 1, 2)]
    assert share_forwards({3: (90, 510)}, COSTS) == [(3,)]


def test_long_adapters_part_from_short_ones():
    rows = {n: (300, 3000) if n % 2 else (40, 400) for n in range(8)}
    assert share_forwards(rows, COSTS) == [(1, 3, 5, 7), (0, 2, 4, 6)]


def test_at_full_size_the_host_needs_as_long_as_some_thousand_rows():
    meta = torch.device("meta")
    full = Costs.of(random_base(PRESETS["full"], meta, torch.bfloat16).model)
    # 1.1 ms of 28 layers against 403 MFLOP a row and layer at 650 TFLOP/s
    assert full.forward == pytest.approx(1776, rel=0.01)
    assert full.run == pytest.approx(484, rel=0.01)
    tiny = Costs.of(tiny_base().model)  # nothing that fits into its forward makes it worth a second
    assert tiny.forward > 1e6


def test_a_pack_in_several_forwards_trains_what_it_trains_in_one(dataset, clean):
    loop = loop_of(dataset, like_gpu=True)
    asked = []
    loop.engine.lanes.costs = Costs(forward=0.0, run=0.0)
    plain = loop.engine.forward_backward

    def noted(batch, counts):
        asked.append(batch.slots)
        return plain(batch, counts)

    loop.engine.forward_backward = noted
    results = [loop.advance() for _ in range(2)]
    assert {len(slots) for slots in asked} == {1}
    same(results, clean, TRIALS, rel=2e-3, abs=2e-3)
