import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from higgs_tune.errors import ConfigError
from higgs_tune.sweep import space


def test_rank_is_searched_as_a_category(make_config):
    searched = space.distributions(make_config())
    assert searched["rank"] == CategoricalDistribution([4, 8, 16, 32])


def test_alpha_does_not_follow_rank(make_config):
    config = make_config()
    values = space.baseline_values(config, fixed_flag=False)
    for rank in config.space.rank:
        assert space.resolve(values | {"rank": rank}, config, 0).alpha == 32
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    config = make_config(space={"alpha": [16, 64]})
    pairs = set()
    for _ in range(60):
        resolved = space.resolve(space.suggest(study.ask(), config), config, 0)
        pairs.add((resolved.rank, resolved.alpha))
    assert len(pairs) == 8, "every alpha with every rank"


def test_the_alpha_rules_agree_at_rank_16_and_scale_differently_elsewhere(make_config):
    config = make_config(space={"rank": [4, 16, 64], "alpha_rule": ["fixed", "rslora", "ratio"]})
    assert space.distributions(config)["alpha_rule"].choices == ("fixed", "rslora", "ratio")
    values = space.baseline_values(config, fixed_flag=False)
    scales = {
        rule: [
            resolved.lora_alpha / rank
            for rank in config.space.rank
            if (resolved := space.resolve(values | {"rank": rank, "alpha_rule": rule}, config, 0))
        ]
        for rule in config.space.alpha_rule
    }
    # scale: 32 / rank, (32 / 4) / √rank, 32 / 16
    assert scales["fixed"] == pytest.approx([8.0, 2.0, 0.5])
    assert scales["rslora"] == pytest.approx([4.0, 2.0, 1.0])
    assert scales["ratio"] == pytest.approx([2.0, 2.0, 2.0])


def test_a_parameter_with_one_value_is_fixed_and_not_searched(make_config):
    config = make_config(space={"rank": [8], "batch_clips": [2, 4]})
    assert set(space.distributions(config)) == {"learning_rate", "batch_clips"}
    assert space.fixed_values(config)["rank"] == 8


def test_new_module_rate_exists_only_where_cross_attention_is_on(make_config):
    config = make_config(
        space={
            "cross_attention": ["off", "text_to_audio"],
            "new_module_lr_factor": {"low": 0.01, "high": 1, "log": True},
        }
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(20):
        trial = study.ask()
        values = space.suggest(trial, config)
        assert ("new_module_lr_factor" in trial.params) == (values["cross_attention"] != "off")
        resolved = space.resolve(values, config, seed=1)
        if values["cross_attention"] == "off":
            assert resolved.new_module_lr_factor == 0.1
        seen.add(values["cross_attention"])
    assert seen == {"off", "text_to_audio"}


def test_cross_attention_adds_its_modules_to_the_targets(make_config):
    config = make_config()
    off = space.resolve(space.baseline_values(config, fixed_flag=False), config, 0)
    on = space.resolve(space.baseline_values(config, fixed_flag=True), config, 0)
    assert off.targets == ("attention", "text_mlp", "audio_mlp")
    assert on.targets == (*off.targets, "audio_attention")
    assert (off.cross_attention, on.cross_attention) == ("off", "audio_self")


def test_a_baseline_inside_the_space_is_expressed_in_searched_parameters(make_config):
    config = make_config()
    values = space.baseline_values(config, fixed_flag=False)
    assert space.searched_part(values, config) == {
        "rank": 16,
        "learning_rate": 1e-4,
        "cross_attention": "off",
    }


@pytest.mark.parametrize(
    "baseline", [{"rank": 64}, {"learning_rate": 1e-5}, {"alpha": 7}, {"target_set": "attention"}]
)
def test_a_baseline_outside_the_space_has_no_searched_parameters(make_config, baseline):
    config = make_config(baseline=baseline)
    values = space.baseline_values(config, fixed_flag=False)
    assert space.searched_part(values, config) is None


def test_the_baselines_batch_is_the_first_of_the_space_unless_it_is_set(make_config):
    for baseline, clips in (({}, 4), ({"batch_clips": 16}, 16)):
        config = make_config(space={"batch_clips": [4, 8, 16]}, baseline=baseline)
        assert space.baseline_values(config, fixed_flag=False)["batch_clips"] == clips
    outside = make_config(space={"batch_clips": [4, 8]}, baseline={"batch_clips": 16})
    assert space.searched_part(space.baseline_values(outside, fixed_flag=False), outside) is None


def test_seeds_differ_between_trials_and_follow_from_the_sweeps_seed():
    seeds = [space.trial_seed(3, "trial", index) for index in range(50)]
    assert len(set(seeds)) == 50
    assert seeds == [space.trial_seed(3, "trial", index) for index in range(50)]
    assert seeds[0] != space.trial_seed(4, "trial", 0)


def test_two_loss_weights_of_zero_are_refused(make_config):
    config = make_config(space={"text_loss_weight": 0, "audio_loss_weight": 0})
    with pytest.raises(ConfigError, match="nothing to learn"):
        space.check(config)


def test_a_value_listed_twice_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"space\.rank: a value is listed twice"):
        space.check(make_config(space={"rank": [4, 4, 8]}))


@pytest.mark.parametrize("num_trials", [2, 3])
def test_a_space_without_anything_to_search_is_refused_unless_only_baselines_run(
    make_config, num_trials
):
    config = make_config(space={"rank": 8, "learning_rate": 1e-3}, tune={"num_trials": num_trials})
    assert space.distributions(config) == {}
    if num_trials == 2:
        space.check(config)
        return
    with pytest.raises(ConfigError, match="every setting has one value, so there is nothing"):
        space.check(config)


def test_a_population_without_a_rate_to_change_is_refused(make_config):
    tune = {"num_trials": 6, "scheduler": {"name": "pbt"}}
    with pytest.raises(ConfigError, match="pbt, which changes learning_rate, new_module_lr_factor"):
        space.check(make_config(space={"learning_rate": 1e-3}, tune=tune))
    space.check(make_config(space={"learning_rate": [1e-3, 2e-3]}, tune=tune))


@pytest.mark.parametrize(
    "name",
    [
        "learning_rate",
        "new_module_lr_factor",
        "dropout",
        "warmup_fraction",
        "text_loss_weight",
        "audio_loss_weight",
    ],
)
def test_a_rate_may_be_one_value_a_list_or_a_range(make_config, name):
    fixed = make_config(space={name: 0.25, "cross_attention": "audio_self"})
    assert space.fixed_values(fixed)[name] == 0.25
    assert name not in space.distributions(fixed)
    sampled = space.suggest(optuna.create_study().ask(), fixed)
    assert getattr(space.resolve(sampled, fixed, seed=0), name) == 0.25
    listed = make_config(space={name: [0.125, 0.25]})
    assert space.distributions(listed)[name] == CategoricalDistribution((0.125, 0.25))
    ranged = make_config(space={name: {"low": 0.125, "high": 0.25, "log": True}})
    assert space.distributions(ranged)[name] == FloatDistribution(0.125, 0.25, log=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 8), ("target_set", "attention"), ("cross_attention", False), ("batch_clips", 4)],
)
def test_a_category_may_be_one_value(make_config, name, value):
    config = make_config(space={name: value})
    assert space.fixed_values(config)[name] == ("off" if value is False else value)


def test_trials_use_a_fixed_learning_rate_and_all_listed_ones(make_config):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for setting, expected in ((2e-4, {2e-4}), ([1e-4, 5e-4], {1e-4, 5e-4})):
        config = make_config(space={"learning_rate": setting})
        trials = [
            space.resolve(space.suggest(study.ask(), config), config, seed) for seed in range(20)
        ]
        assert {trial.learning_rate for trial in trials} == expected


@pytest.mark.parametrize(
    ("setting", "searched", "baseline"),
    [
        (0.1, False, 0.1),
        ([0.2], False, 0.2),
        ([0.0, 0.1], True, 0.0),
        ({"low": 0, "high": 0.3}, True, 0.0),
    ],
)
def test_dropout_may_be_a_number_a_list_or_a_range(make_config, setting, searched, baseline):
    config = make_config(space={"dropout": setting})
    assert ("dropout" in space.distributions(config)) == searched
    values = space.baseline_values(config, fixed_flag=False)
    assert space.resolve(values, config, seed=0).dropout == baseline
    inside = space.searched_part(values, config)
    assert inside is not None and ("dropout" in inside) == searched


@pytest.mark.parametrize("setting", [1.0, -0.1, [], {"low": 0.5, "high": 1}])
def test_an_invalid_dropout_is_refused(make_config, setting):
    with pytest.raises(ConfigError, match=r"space\.dropout"):
        make_config(space={"dropout": setting})
