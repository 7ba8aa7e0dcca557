import optuna

from higgs_tune.sweep import study as studies
from higgs_tune.sweep.confirm import confirm_records
from tests.sweep_fakes import finish, make_searcher


def confirmed(tmp_path, make_config, values, existing=(), **confirm):
    config = make_config(confirm=confirm)
    study = studies.open_study("s", tmp_path, None)
    searcher, _, _ = make_searcher(study, config)
    for number, (text, audio) in enumerate(values):
        searcher.suggest(str(number))
        finish(searcher, str(number), text, audio=audio)
    return confirm_records(study, config, existing)


def test_the_best_and_the_baseline_get_the_same_fresh_seeds(tmp_path, make_config):
    values = [(5.0, 3.0), (4.0, 3.0), (1.0, 9.9), (2.0, 3.0), (3.0, 3.0)]
    records = confirmed(tmp_path, make_config, values, num_configs=2, num_seeds=2)
    assert [record.trial_id for record in records] == [f"c00{index}" for index in range(6)]
    assert [record.confirms for record in records] == ["t000", "t003", "t004"] * 2
    seeds = [record.config.seed for record in records]
    assert len({*seeds[:3]}) == len({*seeds[3:]}) == 1
    assert seeds[0] != seeds[3]
    assert records[0].origin == "confirm"


def test_a_baseline_among_the_best_is_confirmed_once(tmp_path, make_config):
    records = confirmed(tmp_path, make_config, [(1.0, 3.0), (2.0, 3.0)], num_configs=2, num_seeds=1)
    assert [record.confirms for record in records] == ["t000", "t001"]


def test_a_baseline_that_leads_the_search_is_confirmed_beside_the_best_other(tmp_path, make_config):
    values = [(1.0, 3.0), (4.0, 3.0), (2.0, 3.0), (3.0, 3.0)]
    records = confirmed(tmp_path, make_config, values, num_configs=1, num_seeds=2)
    assert [record.confirms for record in records] == ["t000", "t002"] * 2


def test_a_configuration_that_ran_twice_is_among_the_best_only_once(
    study, make_config, monkeypatch
):
    searcher, _, _ = make_searcher(study, make_config())
    for name, text in (("a", 9.0), ("b", 8.0)):
        searcher.suggest(name)
        finish(searcher, name, text)

    def ask():
        study.enqueue_trial({"rank": 4, "learning_rate": 1e-3, "cross_attention": "off"})
        return study.ask()

    monkeypatch.setattr(searcher, "_ask", ask)  # an exhausted space
    for name, text in (("c", 2.0), ("d", 1.0)):
        searcher.suggest(name)
        finish(searcher, name, text)
    best = studies.best_records(study, 3)
    assert [record.trial_id for record in best] == ["t003", "t001", "t000"]


def test_nothing_is_confirmed_when_nothing_is_feasible(tmp_path, make_config):
    assert confirmed(tmp_path, make_config, [(1.0, 9.9)], num_configs=2, num_seeds=2) == []


def test_the_confirm_stage_can_be_switched_off(tmp_path, make_config):
    assert confirmed(tmp_path, make_config, [(1.0, 3.0)], num_configs=0, num_seeds=2) == []


def test_an_extended_sweep_confirms_its_new_best_under_new_ids(tmp_path, make_config):
    first = confirmed(tmp_path, make_config, [(5.0, 3.0), (2.0, 3.0)], num_configs=1, num_seeds=1)
    assert [record.confirms for record in first] == ["t000", "t001"]
    (tmp_path / "more").mkdir()
    values = [(5.0, 3.0), (2.0, 3.0), (1.0, 3.0)]
    second = confirmed(
        tmp_path / "more", make_config, values, existing=first, num_configs=1, num_seeds=1
    )
    ids = [(record.trial_id, record.confirms) for record in second]
    assert ids == [("c000", "t000"), ("c002", "t002")]
    assert second[0] == first[0]


def test_no_seed_of_the_search_is_used_again(tmp_path, make_config):
    values = [(5.0, 3.0), (4.0, 3.0), (3.0, 3.0), (2.0, 3.0)]
    records = confirmed(tmp_path, make_config, values, num_configs=2, num_seeds=3)
    trials = studies.latest(studies.open_study("s", tmp_path, None)).values()
    searched = {studies.record_of(trial).config.seed for trial in trials}
    seeds = {record.config.seed for record in records}
    assert (len(searched), len(seeds)) == (4, 3)
    assert not searched & seeds


def test_an_extended_sweep_with_more_seeds_keeps_the_runs_that_exist(tmp_path, make_config):
    values, options = [(5.0, 3.0), (2.0, 3.0)], {"num_configs": 1}
    first = confirmed(tmp_path, make_config, values, num_seeds=2, **options)
    (tmp_path / "more").mkdir()
    second = confirmed(tmp_path / "more", make_config, values, first, num_seeds=3, **options)
    assert second[:4] == first
    assert [record.trial_id for record in second[4:]] == ["c004", "c005"]


def test_a_trial_without_constraints_is_not_feasible():
    assert not studies.feasible(optuna.trial.create_trial(value=1.0))
