"""Which setting mattered: Optuna's PED-ANOVA over the trials' text loss at one common step."""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)

from higgs_tune import metrics as m
from higgs_tune.report.results import Results, Trial

MIN_TRIALS = 10  # with fewer, the order of the settings is luck
SETTINGS = (
    "learning_rate",
    "rank",
    "target_set",
    "cross_attention",
    "alpha",
    "new_module_lr_factor",
    "dropout",
    "text_loss_weight",
    "audio_loss_weight",
    "batch_clips",
)
_CATEGORICAL = ("rank", "target_set", "cross_attention", "alpha", "batch_clips")
_LOG = ("learning_rate", "new_module_lr_factor")


@dataclass(frozen=True)
class ImportanceInfo:
    """Shares of the text loss's variation among the better trials, the largest first; they sum to 1."""

    shares: dict[str, float]
    step: int  # the losses compared are those of this step
    num_trials: int


@dataclass(frozen=True)
class Level:
    """One value of a setting that is chosen from a list, and the trials that had it."""

    value: Any
    num_trials: int
    best: float  # lowest val/text/nll at the common step
    median: float


def common_step(trials: Sequence[Trial]) -> int:
    """The latest step that at least 60 % of the trials, and MIN_TRIALS, reached; 0 if there is none.

    Trials that were stopped early compare fairly with the others only at a step that all have.
    """
    needed = max(MIN_TRIALS, 0.6 * len(trials))
    steps = sorted({step for t in trials for step, _ in t.curve(m.VAL_TEXT_NLL)}, reverse=True)
    for step in steps:
        if sum(trial.at(step, m.VAL_TEXT_NLL) is not None for trial in trials) >= needed:
            return step
    return 0


def importance_info(results: Results) -> ImportanceInfo | None:
    """The importance of every setting that varied; None with fewer than MIN_TRIALS comparable trials."""
    trials = _reported(results)
    step = common_step(trials)
    compared = [trial for trial in trials if trial.at(step, m.VAL_TEXT_NLL) is not None]
    varied = [name for name in SETTINGS if len({getattr(t.config, name) for t in compared}) > 1]
    if step == 0 or not varied:
        return None
    with _quiet_optuna():
        study = optuna.create_study()
        study.add_trials([_frozen_trial(trial, compared, varied, step) for trial in compared])
        shares = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    known = {name: float(shares.get(name, 0.0)) for name in varied}
    total = sum(known.values())
    if total <= 0:
        return None
    ordered = sorted(known.items(), key=lambda item: -item[1])
    return ImportanceInfo({name: share / total for name, share in ordered}, step, len(compared))


def levels(results: Results, setting: str) -> list[Level]:
    """How each value of a listed setting did at the common step, the best first."""
    trials = _reported(results)
    step = common_step(trials)
    losses: dict[Any, list[float]] = {}
    for trial in trials:
        loss = trial.at(step, m.VAL_TEXT_NLL)
        if loss is not None:
            losses.setdefault(getattr(trial.config, setting), []).append(loss)
    found = [
        Level(value, len(group), min(group), statistics.median(group))
        for value, group in losses.items()
    ]
    return sorted(found, key=lambda level: level.best)


def _reported(results: Results) -> list[Trial]:
    """Trials with results, but for those whose settings changed on the way: none of them led there."""
    reported = (trial for trial in results.search if trial.curve(m.VAL_TEXT_NLL))
    return [trial for trial in reported if not trial.config.schedule]


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep Optuna's "a new study created" and its notices about experimental parts off the terminal."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _acts(trial: Trial, name: str) -> bool:
    return name != "new_module_lr_factor" or trial.config.cross_attention != "off"


def _frozen_trial(
    trial: Trial, compared: Sequence[Trial], varied: Sequence[str], step: int
) -> optuna.trial.FrozenTrial:
    settings = {name: getattr(trial.config, name) for name in varied if _acts(trial, name)}
    return optuna.trial.create_trial(
        params=settings,
        distributions={name: _distribution(compared, name) for name in settings},
        value=trial.at(step, m.VAL_TEXT_NLL),
    )


def _distribution(trials: Sequence[Trial], name: str) -> BaseDistribution:
    """What the trials had, as the widest range or list of it."""
    values = sorted({getattr(trial.config, name) for trial in trials if _acts(trial, name)})
    if name in _CATEGORICAL:
        return CategoricalDistribution(values)
    return FloatDistribution(values[0], values[-1], log=name in _LOG and values[0] > 0)
