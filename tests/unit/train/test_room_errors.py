"""Errors other than lack of memory: one trial's ends that trial, an error of all is raised."""

import pytest
import torch

from higgs_tune import metrics
from higgs_tune.train.engine import Engine
from higgs_tune.train.parallel import World
from higgs_tune.train.room import Ended, agree_across_processes
from tests.packs import OUT_OF_MEMORY, TRIALS, limit_clips, loop_of, rooms, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["forward_backward", "evaluate"])
@pytest.mark.parametrize("lanes, like_gpu", [(1, False), (2, False), (1, True)])
def test_a_trial_that_fails_by_itself_ends_alone(
    dataset, clean, monkeypatch, caplog, method, lanes, like_gpu
):
    loop = loop_of(dataset, lanes=lanes, like_gpu=like_gpu)
    limit_clips(monkeypatch, lambda slots, num: 1 not in slots, ValueError("odd\nsize"), method)
    ended = {}
    while "b" not in ended:
        ended = loop.advance()
    assert ended["b"]["status"] == "failed"
    assert ended["b"]["reason"] == "ValueError: odd"
    assert metrics.VAL_TEXT_NLL not in ended["b"]
    assert "b: ValueError: odd" in caplog.text and "in limited" in caplog.text  # its traceback
    results = [ended] if len(ended) > 1 else []
    results += [loop.advance() for _ in range(2 - len(results))]
    rounding = {"rel": 2e-3, "abs": 2e-3} if like_gpu else {}
    same(results, clean, "ac", **rounding)
    assert all(room._side_by_side and not room._budgets for room in rooms(loop))


@pytest.mark.parametrize("method", ["forward_backward", "evaluate"])
@pytest.mark.parametrize("lanes, like_gpu", [(1, False), (2, False), (1, True)])
def test_an_error_that_does_not_come_back_changes_nothing(
    dataset, clean, monkeypatch, caplog, method, lanes, like_gpu
):
    loop = loop_of(dataset, lanes=lanes, like_gpu=like_gpu)
    errors = iter([ValueError("once")])
    plain = getattr(Engine, method)

    def failing(self, *args, **kwargs):
        result = plain(self, *args, **kwargs)
        for error in errors:
            raise error
        return result

    monkeypatch.setattr(Engine, method, failing)
    same([loop.advance() for _ in range(2)], clean, TRIALS, rel=2e-3, abs=2e-3)
    assert caplog.text.count("ValueError: once") == 1, "it is not hidden"


def test_adapters_that_fail_only_together_fail_once(dataset, monkeypatch, caplog):
    loop = loop_of(dataset, like_gpu=True)
    asked = limit_clips(monkeypatch, lambda slots, num: len(slots) == 1, ValueError("in company"))
    assert {result["status"] for result in loop.advance().values()} == {"running"}
    assert [len(slots) for slots, _ in asked].count(3) == 1
    assert caplog.text.count("ValueError: in company") == 1


@pytest.mark.parametrize("of_base", [True, False])
def test_a_validation_error_of_all_is_raised_only_if_the_base_fails_too(
    dataset, monkeypatch, of_base
):
    loop = loop_of(dataset, "ab")
    loop.advance(lambda: True)
    loop.join("c", TRIALS["c"])  # due a step later
    plain = Engine.evaluate

    def failing(self, batch, *, bare=False):
        if of_base or not bare:
            raise OSError("too many open files")
        return plain(self, batch, bare=bare)

    monkeypatch.setattr(Engine, "evaluate", failing)
    if of_base:
        with pytest.raises(OSError, match="too many open files"):
            loop.advance()
    else:
        results = loop.advance()
        assert {n: r["status"] for n, r in results.items()} == {"a": "failed", "b": "failed"}


@pytest.mark.parametrize("names", ["a", "abc"])
@pytest.mark.parametrize("method", ["forward_backward", "evaluate"])
def test_an_error_of_all_trials_is_raised(dataset, monkeypatch, method, names):
    loop = loop_of(dataset, names)
    error = RuntimeError("shapes differ")
    limit_clips(monkeypatch, lambda slots, num: False, error, method)
    with pytest.raises(RuntimeError, match="shapes differ") as raised:
        loop.advance()
    assert "limited" in [entry.name for entry in raised.traceback]


def test_with_several_processes_an_error_is_raised_where_it_happens():
    with pytest.raises(ValueError, match="odd"):
        agree_across_processes({0: Ended(ValueError("odd"))}, World(size=2))


def test_an_error_that_is_its_own_cause_ends_its_trial(dataset, monkeypatch):
    error = ValueError("odd")
    error.__cause__ = error
    loop = loop_of(dataset)
    limit_clips(monkeypatch, lambda slots, num: 1 not in slots, error)
    assert loop.advance()["b"]["status"] == "failed"


def test_check_raises_only_if_not_even_the_base_can_be_computed(dataset, monkeypatch):
    loop = loop_of(dataset, "ab")
    before = loop.engine.state("a").weights
    loop.check()
    assert all(torch.equal(loop.engine.state("a").weights[n], w) for n, w in before.items())
    limit_clips(monkeypatch, lambda slots, num: False, ValueError("device lost"), "evaluate")
    with pytest.raises(ValueError, match="device lost"):
        loop.check()


def test_check_only_warns_if_a_pack_leaves_the_base_no_memory(dataset, monkeypatch, caplog):
    loop = loop_of(dataset, "ab")
    limit_clips(monkeypatch, lambda slots, num: False, OUT_OF_MEMORY, "evaluate")
    loop.check()
    assert "no memory to compute the base" in caplog.text
    for name in "ab":
        loop.leave(name)
    with pytest.raises(MemoryError):  # without a pack it is an error
        loop.check()
    assert not any(slot >= 0 for room in rooms(loop) for slot in room._budgets)
