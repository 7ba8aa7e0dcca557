"""Which adapters share a forward: wasted arithmetic on padding against host time."""

from itertools import combinations, pairwise, zip_longest

import numpy as np
import pytest
import torch
from random_base import PRESETS, random_base

from higgs_tune.train.forwards import Costs, cost_of, share_forwards
from tests.models import tiny_base
from tests.packs import TRIALS, limit_clips, loop_of, same

COSTS = Costs(forward=1000.0, run=100.0)


def cost(groups, rows, costs):
    """A second implementation: padded rows of each forward, or its host time if that is longer."""
    total = 0.0
    for group in groups:
        for parts in zip_longest(*(rows[slot] for slot in group)):
            there = [slot for slot, part in zip(group, parts, strict=True) if part]
            text, audio = (max(part[n] for part in parts if part) for n in range(2))
            runs = len(there) - sum(slot + 1 in there for slot in there)
            total += max(len(there) * (text + audio), costs.forward + runs * costs.run)
    return total


def every_cut(slots):
    """All ways to cut a list into runs of neighbours."""
    for number in range(len(slots)):
        for cuts in combinations(range(1, len(slots)), number):
            edges = [0, *cuts, len(slots)]
            yield [tuple(slots[a:b]) for a, b in pairwise(edges)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_by_length_costs_less(seed):
    rng = np.random.default_rng(seed)
    rows = {
        int(n): [tuple(map(int, rng.integers(10, 1500, 2))) for _ in range(rng.integers(1, 4))]
        for n in rng.permutation(9)[:6]
    }
    groups = share_forwards(rows, COSTS)
    assert sorted(slot for group in groups for slot in group) == sorted(rows)
    assert all(group == tuple(sorted(group)) for group in groups)
    by_length = sorted(rows, key=lambda slot: -sum(map(sum, rows[slot])))
    least = min(cost(way, rows, COSTS) for way in every_cut(by_length))
    assert cost(groups, rows, COSTS) == pytest.approx(least)


def test_equal_adapters_and_short_steps_share_one_forward():
    assert share_forwards({key: [(90, 510)] for key in range(8)}, COSTS) == [tuple(range(8))]
    assert share_forwards({0: [(5, 9)], 1: [(50, 90)], 2: [(90, 300)]}, COSTS) == [(0, 1, 2)]
    assert share_forwards({3: [(90, 510)]}, COSTS) == [(3,)]


def test_adapters_with_many_short_forwards_share_them():
    """Many clips make a step long, but a small token budget keeps each of its forwards short."""
    long, short = [(30, 200)] * 12, [(30, 200)] * 2
    assert share_forwards({0: long, 1: short, 2: long, 3: short}, COSTS) == [(0, 1, 2, 3)]


def test_long_and_short_adapters_get_separate_forwards():
    rows = {n: [(300, 3000)] if n % 2 else [(40, 400)] for n in range(8)}
    assert share_forwards(rows, COSTS) == [(1, 3, 5, 7), (0, 2, 4, 6)]


def test_at_full_size_host_time_equals_some_thousand_rows():
    meta = torch.device("meta")
    full = Costs.of(random_base(PRESETS["full"], meta, torch.bfloat16).model)
    # a layer: 68 operations of 15 µs, against 403 MFLOP per row at 783 TFLOP/s
    assert full.forward == pytest.approx(1983, rel=0.01)
    assert full.run == pytest.approx(1516, rel=0.01)
    tiny = Costs.of(tiny_base().model)  # no forward has enough rows to be worth splitting
    assert tiny.forward > 1e6


# splits the three trials into two forwards in most steps
SOME = Costs(forward=150.0, run=0.0)


def test_a_pack_trains_the_same_however_it_is_split_into_forwards(dataset, clean, monkeypatch):
    loop = loop_of(dataset, like_gpu=True)
    loop.engine.lanes.costs = SOME
    asked = limit_clips(monkeypatch, lambda slots, num: True)
    results = [loop.advance() for _ in range(2)]
    assert {len(slots) for slots, _ in asked} >= {1, 2}
    same(results, clean, TRIALS, rel=2e-3, abs=2e-3)


def test_running_out_of_memory_in_one_of_several_forwards_changes_nothing(
    dataset, clean, monkeypatch
):
    loop = loop_of(dataset, like_gpu=True)
    loop.engine.lanes.costs = SOME
    asked = limit_clips(monkeypatch, lambda slots, num: len(slots) < 2)
    results = [loop.advance() for _ in range(2)]
    assert sum(len(slots) > 1 for slots, _ in asked) == 1  # not tried again
    assert loop._gradients.room.width == 1
    same(results, clean, TRIALS, rel=2e-3, abs=2e-3)


def test_each_run_of_neighbouring_slots_costs_host_time():
    rows = {slot: [(1, 1)] for slot in range(4)}
    found = [cost_of(group, rows, COSTS) for group in ((0, 1), (0, 2), (0, 1, 3))]
    assert found == [1100, 1200, 1200]
