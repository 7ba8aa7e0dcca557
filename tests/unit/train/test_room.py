"""Steps and validations out of memory are redone in smaller parts; other trials are unaffected."""

import gc
import logging
import weakref

import pytest
import torch

from higgs_tune import metrics
from higgs_tune.errors import is_out_of_memory
from higgs_tune.model import packed_forward
from higgs_tune.train.engine import Engine
from higgs_tune.train.room import Room
from tests.packs import OUT_OF_MEMORY, TRIALS, limit_clips, loop_of, same

pytestmark = pytest.mark.usefixtures("one_thread")

ERRORS = {
    "device": OUT_OF_MEMORY,
    "host": MemoryError(),
    "host tensor": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"
    ),
    "beside the allocator": RuntimeError(
        "cuDNN SDPA execution failed: CUDA ran out of memory outside PyTorch's allocator"
    ),
}


def fail_once(monkeypatch, number, *, backward):
    """Raise in the n-th call of an operation inside the layers, or in its backward."""
    plain, calls = packed_forward.swiglu, []

    def tick(*args):
        calls.append(0)
        if len(calls) == number:
            raise ERRORS["device"]

    def swiglu(x):
        if not backward:
            tick()
        elif x.requires_grad:
            x.register_hook(tick)
        return plain(x)

    monkeypatch.setattr(packed_forward, "swiglu", swiglu)
    return calls


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("number", [1, 3, 6, 14])
def test_gradients_of_a_failed_attempt_do_not_count(dataset, clean, monkeypatch, number, backward):
    loop = loop_of(dataset, like_gpu=True)
    calls = fail_once(monkeypatch, number, backward=backward)
    results = [loop.advance() for _ in range(2)]
    assert len(calls) > number
    assert loop._gradients.room.width == 2
    # other shapes round differently; gradients counted twice would be clipped, but show in the norm
    same(results, clean, TRIALS, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_trial_that_does_not_fit_ends_alone(dataset, clean, monkeypatch, lanes, caplog):
    loop = loop_of(dataset, lanes=lanes)
    asked = limit_clips(monkeypatch, lambda slots, num: 1 not in slots)
    with caplog.at_level(logging.WARNING):
        ended = loop.advance()  # at once; the others are in the middle of their interval
        results = [loop.advance() for _ in range(2)]
    assert list(ended) == ["b"]
    assert ended["b"]["status"] == "out_of_memory"
    reason = ended["b"]["reason"]
    assert reason.startswith("not even one conversation fits in a training step; the longest, ")
    assert " rows, and data.max_rows leaves longer ones out: CUDA out of memory" in reason
    assert metrics.VAL_TEXT_NLL not in ended["b"]
    same(results, clean, "ac")
    for name in "ac":
        for key, weight in loop.engine.state(name).weights.items():
            assert torch.equal(weight, clean[1][name].weights[key])
    sizes = [num for slots, num in asked if slots == (1,)]
    assert sizes[0] == 4 and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)
    assert "lower token_budget, or a sweep's tune.slots_per_worker" in caplog.text


def test_shorter_micro_batches_give_the_same_step_and_are_remembered(dataset, clean, monkeypatch):
    loop = loop_of(dataset)
    asked = limit_clips(monkeypatch, lambda slots, num: num <= 2)
    results = [loop.advance() for _ in range(2)]
    same(results, clean, "bc", rel=2e-3, abs=2e-3)  # other micro-batches draw other masks for "a"
    same(results, clean, "c")
    assert sum(num > 2 for _, num in asked) < 6  # out of 10 steps of two adapters
    assert all(num <= 2 for _, num in asked[len(asked) // 2 :])


def test_a_smaller_width_is_kept_until_an_adapter_leaves(dataset, monkeypatch):
    loop = loop_of(dataset, like_gpu=True)
    room = loop._gradients.room
    asked = limit_clips(monkeypatch, lambda slots, num: len(slots) < 2)
    loop.advance()
    assert [len(slots) for slots, _ in asked[:6]] == [3, 2, 1, 1, 1, 1]
    assert all(len(slots) == 1 for slots, _ in asked[2:])
    room._device = torch.device("meta")  # makes `forget` behave as on a GPU
    loop.leave("b")
    asked.clear()
    loop.advance()
    assert [len(slots) for slots, _ in asked[:3]] == [2, 1, 1]


def test_a_gpu_frees_unused_memory_and_retries_unchanged_before_splitting(
    dataset, clean, monkeypatch, caplog
):
    loop = loop_of(dataset, like_gpu=True)
    room = loop._gradients.room
    room._keeps_pieces = True
    given_back = []
    failing = {3, 8, 9}  # numbers of forwards; 9 is the retry of 8
    plain = Engine.forward_backward
    asked = []

    def in_pieces(self, batch, counts):
        asked.append((len(batch.slots), len(given_back)))
        if len(asked) in failing:
            raise OUT_OF_MEMORY
        return plain(self, batch, counts)

    monkeypatch.setattr(Engine, "forward_backward", in_pieces)
    monkeypatch.setattr(Room, "_give_back", lambda self: given_back.append(0))
    with caplog.at_level(logging.WARNING):
        results = [loop.advance() for _ in range(2)]
    assert [num for num, _ in asked[:10]] == [3] * 9 + [2]
    assert [backs for _, backs in asked[2:5]] == [0, 1, 1]
    assert (room.width, room._budgets) == (2, {})
    assert caplog.text.count("retrying after all unused memory was given back") == 2
    same(results, clean, TRIALS, rel=2e-3, abs=2e-3)


def test_lanes_that_need_too_much_together_take_turns(dataset, clean, monkeypatch):
    loop = loop_of(dataset, lanes=2)
    running = []
    plain = Engine.forward_backward

    def counted(self, batch, counts):
        running.append(batch.slots)
        try:
            if loop._gradients.room._side_by_side:
                raise ERRORS["host tensor"]
            return plain(self, batch, counts)
        finally:
            running.pop()

    monkeypatch.setattr(Engine, "forward_backward", counted)
    same([loop.advance() for _ in range(2)], clean, TRIALS)
    assert not loop._gradients.room._budgets


@pytest.mark.parametrize("width", [1, None])
def test_validation_that_runs_out_of_memory_is_redone_in_smaller_parts(
    dataset, clean, monkeypatch, width
):
    loop = loop_of(dataset)
    loop._validator.room.width = width
    asked = limit_clips(
        monkeypatch, lambda slots, num: len(slots) == 1 and num == 1, method="evaluate"
    )
    same([loop.advance() for _ in range(2)], clean, TRIALS, rel=1e-4, abs=1e-5)
    assert asked[-1][1] == 1
    assert loop._validator.room.width == 1


def test_a_trial_without_memory_to_validate_ends_alone(dataset, clean, monkeypatch):
    loop = loop_of(dataset)
    limit_clips(monkeypatch, lambda slots, num: slots != (2,), method="evaluate")
    results = loop.advance()
    assert results["c"]["status"] == "out_of_memory"
    assert "conversation fits in a validation" in results["c"]["reason"]
    same([results], clean, "ab")
    with pytest.raises(MemoryError, match="conversation fits in a validation"):
        loop.validate(["c"])


@pytest.mark.parametrize("name", ERRORS)
def test_every_out_of_memory_error_is_recognised(dataset, clean, monkeypatch, name):
    loop = loop_of(dataset)
    limit_clips(monkeypatch, lambda slots, num: 0 not in slots, ERRORS[name])
    assert {n: r["status"] for n, r in loop.advance().items()} == {"a": "out_of_memory"}
    results = loop.advance()
    assert {n: r["status"] for n, r in results.items()} == {"b": "running", "c": "running"}
    same([results], clean, "bc")


def test_a_value_error_is_not_taken_for_out_of_memory():
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_failed_attempt_is_freed_before_memory_is_given_back(dataset, monkeypatch):
    loop = loop_of(dataset, "a")
    held: list[weakref.ref] = []
    plain = Engine.forward_backward

    def failing(self, batch, counts):
        if held:
            return plain(self, batch, counts)
        activations = torch.zeros(100)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")  # a new one, which holds its frames

    alive = []
    monkeypatch.setattr(Engine, "forward_backward", failing)
    monkeypatch.setattr(Room, "_give_back", lambda self: alive.append(held[0]()))
    gc.disable()
    try:
        loop.advance()
    finally:
        gc.enable()
    assert alive == [None]
