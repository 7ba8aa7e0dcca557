"""Which worker a trial is sent to."""

import pytest

from higgs_tune.sweep.confirm import ConfirmSource
from higgs_tune.sweep.seats import SITS_AT
from higgs_tune.sweep.study import record_of
from tests.sweep_fakes import make_searcher

TWO = ["w0", "w1"]


def test_trials_go_to_the_least_loaded_worker(study, make_config):
    searcher, _, _ = make_searcher(study, make_config())
    searcher._workers = TWO
    assert [searcher.suggest(name)["worker"] for name in "abc"] == [0, 1, 0]


def test_a_worker_that_trains_is_filled_before_one_that_is_not_there(study, make_config):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO, serving=lambda: [1])
    searcher.set_max_concurrency(4)
    assert [searcher.suggest(name)["worker"] for name in "abcd"] == [1, 1, 0, 0]


@pytest.mark.parametrize("stage", ["search", "confirm"])
def test_a_trial_counts_where_it_sits_not_where_it_was_sent(study, make_config, stage):
    searcher, _, _ = make_searcher(study, make_config(), workers=TWO, serving=lambda: [0, 1])
    source = searcher
    if stage == "confirm":
        for name in "abcde":
            searcher.suggest(name)
        records = [record for trial in study.trials if (record := record_of(trial))]
        source = ConfirmSource(
            records,
            checkpoint_of=lambda trial_id: None,
            workers=TWO,
            publish=lambda roster, beat: None,
            serving=lambda: [0, 1],
        )
    source.set_max_concurrency(6)
    assert [source.suggest(name)["worker"] for name in "abc"] == [0, 1, 0]
    source.on_trial_result("a", {SITS_AT: 1})
    source.on_trial_result("c", {SITS_AT: 1})
    assert [source.suggest(name)["worker"] for name in "de"] == [0, 0]
