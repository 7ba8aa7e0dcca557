"""Which worker a trial is sent to, and how many trials are sent."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from higgs_tune.sweep.search import ConfirmSource
from higgs_tune.sweep.seats import SITS_AT
from higgs_tune.sweep.study import latest, record_of
from tests.sweep_fakes import make_searcher, report

TWO = ["w0", "w1"]


def test_trials_go_to_the_least_loaded_worker(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO)
    assert [searcher.suggest(name)["worker"] for name in "abc"] == [0, 1, 0]


def test_a_serving_worker_is_filled_before_one_that_does_not_serve_yet(study, make_config):
    options = {"workers": TWO, "serving": lambda: [1], "rooms": lambda: [2, 2]}
    searcher, _, _ = make_searcher(study, make_config(), **options)
    assert [searcher.suggest(name)["worker"] for name in "abcd"] == [1, 1, 0, 0]


@pytest.mark.parametrize("stage", ["search", "confirm"])
def test_a_trial_counts_where_it_sits_not_where_it_was_sent(study, make_config, stage):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO, serving=lambda: [0, 1])
    source = searcher
    if stage == "confirm":
        for name in "abcde":
            searcher.suggest(name)
        records = [record_of(trial) for trial in latest(study).values()]
        source = ConfirmSource(
            records,
            checkpoint_of=lambda trial_id: None,
            workers=TWO,
            publish=lambda roster, beat: None,
            serving=lambda: [0, 1],
            rooms=lambda: [3, 3],
        )
    assert [source.suggest(name)["worker"] for name in "abc"] == [0, 1, 0]
    source.on_trial_result("a", {SITS_AT: 1})
    source.on_trial_result("c", {SITS_AT: 1})
    assert [source.suggest(name)["worker"] for name in "de"] == [0, 0]


def test_more_trials_are_sent_once_a_worker_has_more_room(study, make_config):
    rooms = [2]
    searcher, rosters, _ = make_searcher(study, make_config(), rooms=lambda: rooms)
    assert [searcher.suggest(name) is None for name in "abc"] == [False, False, True]
    assert (rosters[-1].live, rosters[-1].room) == (("t000", "t001"), 2)
    rooms[0] = 3
    assert searcher.suggest("c") is not None
    assert (rosters[-1].live, rosters[-1].room) == (("t000", "t001", "t002"), 3)
    assert searcher.suggest("d") is None


def test_one_trial_is_suggested_even_while_no_worker_has_room(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(), rooms=lambda: [0])
    assert searcher.suggest("a") is not None  # else Tune would not ask again for minutes
    assert searcher.suggest("b") is None


@pytest.mark.parametrize("status", ["PENDING", "PAUSED"])
def test_a_restarted_trial_is_sent_to_the_worker_where_it_sat(study, make_config, status):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO)
    config = searcher.suggest("a")
    assert config["worker"] == 0
    searcher.on_trial_result("a", {**report(5.0, 25), SITS_AT: 1})
    searcher.watch([SimpleNamespace(trial_id="a", status=status, config=config)])
    assert config["worker"] == 1  # else it would leave its seat there


def test_a_single_worker_gets_one_trial_until_its_base_is_loaded(study, make_config):
    serving: list[int] = []
    searcher, rosters, _ = make_searcher(study, make_config(), serving=lambda: serving)
    assert searcher.suggest("a") is not None  # Tune needs one to wait for
    assert searcher.suggest("b") is None
    assert rosters[-1].room == 1000  # the pack still begins with all of them
    serving.append(0)
    assert searcher.suggest("b") is not None


def test_several_workers_get_trials_before_any_base_is_loaded(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO, serving=lambda: [])
    assert all(searcher.suggest(name) for name in "abc")


def test_the_roster_has_the_configurations_of_new_trials_without_results(study, make_config):
    checkpoints = {"t001": (Path("somewhere"), 25)}
    searcher, _, _ = make_searcher(study, make_config())
    for name in "ab":
        searcher.suggest(name)
        searcher.on_trial_result(name, report(5.0, 25))
    searcher.cancel_live("stopped")
    searcher, rosters, _ = make_searcher(study, make_config(), checkpoints)
    configs = {name: searcher.suggest(name) for name in "abcd"}
    new = {config["id"]: config["trial"] for config in configs.values()}
    del new["t001"]  # it continues from a checkpoint, which its process brings
    assert {name: c.model_dump(mode="json") for name, c in rosters[-1].new.items()} == new
    searcher.on_trial_result("c", report(5.0, 25))
    searcher.publish()
    assert rosters[-1].new.keys() == {"t000", "t003"}
