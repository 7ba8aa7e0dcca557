"""A pack of three trials that can be made to fail, to compare with a clean run."""

import pytest
import torch

from higgs_tune.train.engine import Engine
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from higgs_tune.train.room import Room
from tests.models import DATA, tiny_base, trial
from tests.runs import figures

TRIALS = {
    "a": trial(seed=1, dropout=0.2),
    "b": trial(seed=2, rank=2, targets=("attention",), batch_clips=4),
    "c": trial(seed=3, rank=8, targets=("text_mlp", "text_head"), batch_clips=2),
}
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def loop_of(dataset, names="abc", *, like_gpu=False, lanes=1, base=None, trials=TRIALS):
    limits = PackLimits.of(list(trials.values()), len(trials))
    loop = PackLoop(base or tiny_base(), dataset, DATA, limits)
    loop.engine.lanes.count = lanes
    if like_gpu:
        for room in rooms(loop):
            room.width = None
    for name in names:
        loop.join(name, trials[name])
    return loop


def rooms(loop) -> tuple[Room, Room]:
    return loop._gradients.room, loop._validator.room


def same(results, clean, names, **tolerance):
    for ours, theirs in zip(results, clean[0], strict=False):
        for name in names:
            mine, others = figures(ours[name]), figures(theirs[name])
            assert mine.keys() == others.keys()
            for key, value in others.items():
                if tolerance and isinstance(value, float):
                    value = pytest.approx(value, **tolerance)
                assert mine[key] == value, (name, key)


def limit_clips(monkeypatch, allowed, error=OUT_OF_MEMORY, method="forward_backward"):
    """Make forwards fail unless `allowed(slots, num_sequences)`; returns a list of all attempts."""
    plain, asked = getattr(Engine, method), []

    def limited(self, batch, *args, **kwargs):
        this = batch.slots, len(batch.seq_from_slot_RL)
        asked.append(this)
        result = plain(self, batch, *args, **kwargs)  # leaves gradients behind
        if not allowed(*this):  # not asked[-1], which may be another lane's
            raise error
        return result

    monkeypatch.setattr(Engine, method, limited)
    return asked
