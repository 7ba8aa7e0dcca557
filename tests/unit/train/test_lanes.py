"""Lanes: parts of a pack computed side by side on a CPU."""

import threading

import pytest
import torch

from higgs_tune.train.forwards import Costs
from higgs_tune.train.lanes import Lanes
from tests.threads import torch_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_cores():
    with torch_threads(2):
        yield


def test_lanes_take_one_slot_at_a_time_heaviest_first(two_cores):
    rows = {0: [(4, 6)], 1: [(40, 5), (40, 5)], 2: [(5, 45)], 3: [(45, 5)]}
    assert Lanes(CPU).groups(rows) == [(1,), (2,), (3,), (0,)]
    assert Lanes(torch.device("cuda")).groups(rows) == [(0, 1, 2, 3)]
    assert Lanes(torch.device("cuda"), Costs(0, 0)).groups(rows) == [(1,), (2,), (3,), (0,)]


def test_tasks_run_in_parallel_on_one_core_each_and_keep_their_order(two_cores):
    both = threading.Barrier(2, timeout=30)  # passes only when two tasks run at the same time

    def task(n):
        both.wait()
        return n, torch.get_num_threads()

    assert Lanes(CPU).run([lambda n=n: task(n) for n in range(4)]) == [(n, 1) for n in range(4)]
    assert torch.get_num_threads() == 2


def test_an_error_in_a_lane_reaches_the_caller(two_cores):
    def fail():
        raise ValueError("from a lane")

    with pytest.raises(ValueError, match="from a lane"):
        Lanes(CPU).run([fail, lambda: None])
