"""The search space: which Optuna parameters exist, and how their values become a TrialConfig."""

import hashlib
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from higgs_tune.config import RATES, SweepConfig, TrialConfig
from higgs_tune.config_file import validate
from higgs_tune.config_space import Range
from higgs_tune.errors import ConfigError

Values = dict[str, Any]
# Acts only where cross-attention modules exist, so it is a parameter only there.
CROSS_ATTENTION_ONLY = "new_module_lr_factor"


def trial_seed(sweep_seed: int, *path: str | int) -> int:
    """A seed below 2**31 that depends on nothing but its arguments."""
    text = ":".join(str(part) for part in (sweep_seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1


def fixed_values(config: SweepConfig) -> Values:
    """The parameters for which the space has exactly one value."""
    return {
        name: setting[0]
        for name, setting in config.space
        if isinstance(setting, tuple) and len(setting) == 1
    }


def distributions(config: SweepConfig) -> dict[str, BaseDistribution]:
    """The searched parameters, by name; rank is a category, never an integer range."""
    searched: dict[str, BaseDistribution] = {}
    fixed = fixed_values(config)
    for name, setting in config.space:
        if name in fixed:
            continue
        if isinstance(setting, Range):
            searched[name] = FloatDistribution(setting.low, setting.high, log=setting.log)
        else:
            searched[name] = CategoricalDistribution(setting)
    return searched


def searched_rates(config: SweepConfig) -> dict[str, Range | tuple[float, ...]]:
    """Ranges or values of the searched rates, which a running trial may change within its layout."""
    fixed = fixed_values(config)
    return {name: getattr(config.space, name) for name in RATES if name not in fixed}


def suggest(trial: optuna.Trial, config: SweepConfig) -> Values:
    """Ask `trial` for each searched parameter that has an effect, in the order of the settings."""
    values = fixed_values(config)
    searched = distributions(config)
    conditional = searched.pop(CROSS_ATTENTION_ONLY, None)
    for name, distribution in searched.items():
        values[name] = _ask(trial, name, distribution)
    if conditional is not None and values["cross_attention"] != "off":
        values[CROSS_ATTENTION_ONLY] = _ask(trial, CROSS_ATTENTION_ONLY, conditional)
    return values


def _ask(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def baseline_values(config: SweepConfig, *, fixed_flag: bool) -> Values:
    """The user's own configuration, before (`fixed_flag` false) and after the usual fix."""
    values: Values = config.baseline.model_dump(exclude={"with_audio_self"})
    values["cross_attention"] = "audio_self" if fixed_flag else "off"
    # what applies to a user who sets none of these
    usual = {"text_loss_weight": 1.0, "audio_loss_weight": 1.0, "dropout": 0.0}
    usual["warmup_fraction"] = 0.1
    if fixed_flag:
        usual[CROSS_ATTENTION_ONLY] = 0.1
    values |= usual | {n: v for n, v in fixed_values(config).items() if n in usual}
    values["batch_clips"] = config.baseline.batch_clips or config.space.batch_clips[0]
    return values


def searched_part(values: Values, config: SweepConfig) -> Values | None:
    """The Optuna parameters for `values`, or None if the space does not contain all of them.

    All or nothing: a trial with only some of the parameters would split the sampler's joint space,
    and one with a value outside its distribution would have to widen the search.
    """
    inside: Values = {}
    searched = distributions(config)
    for name, value in values.items():
        if name not in searched:
            if fixed_values(config)[name] != value:
                return None
            continue
        distribution = searched[name]
        if isinstance(distribution, CategoricalDistribution):
            if value not in distribution.choices:
                return None
        elif not distribution._contains(distribution.to_internal_repr(value)):
            return None
        inside[name] = value
    return inside


def resolve(values: Mapping[str, Any], config: SweepConfig, seed: int) -> TrialConfig:
    """The complete configuration of one trial.

    Raises:
        ConfigError: the values contradict each other, e.g. both loss weights are 0.
    """
    targets = config.target_sets[values["target_set"]]
    if values["cross_attention"] != "off":
        targets = (*targets, "audio_attention")
    raw = {**values, **config.train.model_dump(), "targets": targets, "seed": seed}
    if values["cross_attention"] == "off":
        raw.pop(CROSS_ATTENTION_ONLY, None)
    return validate(TrialConfig, raw, "a trial's configuration")


def check(config: SweepConfig) -> None:
    """Refuse a space whose baselines cannot be built, that lists a value twice or has nothing to search.

    Raises:
        ConfigError: it is such a space.
    """
    for fixed_flag in (False, True)[: config.num_baselines]:
        resolve(baseline_values(config, fixed_flag=fixed_flag), config, 0)
    duplicated = [
        name
        for name, setting in config.space
        if isinstance(setting, tuple) and len(set(setting)) != len(setting)
    ]
    if duplicated:
        raise ConfigError(f"space.{duplicated[0]}: a value is listed twice; list each one once.")
    if config.tune.num_trials > config.num_baselines and not distributions(config):
        raise ConfigError(
            "space: every setting has one value, so there is nothing to search. Give at least one setting "
            "a list of values or a range, or train one configuration with `higgs-tune train`."
        )
    if config.tune.scheduler.name == "pbt" and not searched_rates(config):
        raise ConfigError(
            f"tune.scheduler.name is pbt, which changes {', '.join(RATES)}, but space has one value for "
            "each of them. Give at least one a list of values or a range, or use another scheduler."
        )


def short_name(trial_id: str, trial: TrialConfig) -> str:
    """A trial's name in tables and in the Ray dashboard."""
    rate = trial.rates_at(trial.num_steps)["learning_rate"]
    return f"{trial_id} r{trial.rank} lr{rate:.1e} {trial.cross_attention} {trial.target_set}"


def same_but_seed(left: TrialConfig, right: TrialConfig) -> bool:
    """Whether two trials differ in nothing but their seeds."""
    return left.model_copy(update={"seed": right.seed}) == right
