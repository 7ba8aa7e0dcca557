"""An interval's metrics: means over its targets, even if it is gathered or saved in between."""

import json
import math

import numpy as np
import pytest
import torch

from higgs_tune import metrics
from higgs_tune.data.collate import TargetCounts
from higgs_tune.train.interval import Interval
from higgs_tune.train.parallel import World

STEPS = [
    (torch.tensor([6.0, 2.0, 8.0]), torch.tensor(0.5), TargetCounts(3, np.array([2, 4])), 10),
    (torch.tensor([9.0, 4.0, 1.0]), torch.tensor(0.1), TargetCounts(2, np.array([1, 1])), 30),
    (torch.tensor([0.0, 3.0, 3.0]), torch.tensor(0.3), TargetCounts(0, np.array([3, 1])), 20),
]


def filled(steps=STEPS) -> Interval:
    interval = Interval(seconds=4.0, seconds_before=6.0)
    for step in steps:
        interval.add(*step)
    return interval


def test_losses_are_divided_by_the_targets_of_all_steps():
    interval = filled()
    assert interval.num_steps == 3
    interval.gather()
    figures = interval.metrics()
    assert figures[metrics.TRAIN_TEXT_NLL] == pytest.approx(15 / 5)
    assert figures[metrics.TRAIN_AUDIO_NLL] == pytest.approx((9 / 6 + 12 / 6) / 2)
    assert figures[metrics.GRAD_NORM] == pytest.approx(0.3)
    assert figures[metrics.TOKENS_PER_S] == pytest.approx(60 / 4)
    assert figures[metrics.TRAIN_TIME_S] == pytest.approx(10)


def test_an_interval_saved_and_loaded_midway_has_the_same_figures():
    whole = filled()
    whole.gather()
    half = filled(STEPS[:2])
    half.gather()
    again = Interval(**json.loads(json.dumps(half.state())))
    again.add(*STEPS[2])
    again.gather()
    assert again.metrics() == whole.metrics()


def test_a_modality_without_targets_has_nan_as_loss():
    interval = filled([(torch.zeros(3), torch.tensor(1.0), TargetCounts(0, np.array([1, 0])), 5)])
    interval.gather()
    figures = interval.metrics()
    assert math.isnan(figures[metrics.TRAIN_TEXT_NLL])
    assert math.isnan(figures[metrics.TRAIN_AUDIO_NLL])


def test_an_interval_without_steps_has_only_its_time():
    following = filled().next()
    assert following.num_steps == 0
    assert following.metrics() == {metrics.TRAIN_TIME_S: 10.0}


class Two(World):
    """Two processes with the same figures."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return 2 * values


def test_nats_and_rows_are_summed_over_processes():
    interval = filled()  # its target counts are already those of all processes
    interval.gather(Two())
    figures = interval.metrics()
    assert figures[metrics.TRAIN_TEXT_NLL] == pytest.approx(2 * 15 / 5)
    assert figures[metrics.GRAD_NORM] == pytest.approx(0.3)
    assert figures[metrics.TOKENS_PER_S] == pytest.approx(2 * 60 / 4)
