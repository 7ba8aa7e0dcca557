"""Which setting mattered: the share of the trials' ranking by text loss that each one explains.

With the few trials of a sweep, some setting always seems to matter, so each share is compared with what it
reaches when the losses are shuffled. Ranks are used because one bad trial's loss would outweigh all others.

Shape letters: N trials, P rows of ranks (the real ones, then shuffles), K basis vectors.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from higgs_tune import metrics as m
from higgs_tune.report.results import Results, Trial

MIN_TRIALS = 8  # with fewer, hardly any effect would exceed chance
SETTINGS = (
    "learning_rate",
    "rank",
    "target_set",
    "cross_attention",
    "alpha",
    "alpha_rule",
    "new_module_lr_factor",
    "dropout",
    "warmup_fraction",
    "text_loss_weight",
    "audio_loss_weight",
    "batch_clips",
)
CATEGORICAL = ("target_set", "cross_attention", "alpha_rule")  # settings whose values have no order
_NUM_SHUFFLES = 1000
_CONFIDENCE = 0.95  # over all settings: by chance, one sweep in 20 names one


@dataclass(frozen=True)
class ImportanceInfo:
    """Share of the ranking by text loss for each varied setting, the one furthest beyond chance first.

    Shares lie between 0 and 1; they overlap, so their sum means nothing.
    """

    shares: dict[str, float]
    by_chance: dict[str, float]  # what each share must exceed; corrected for testing all settings
    step: int  # at which the losses are compared
    num_trials: int

    @property
    def mattered(self) -> tuple[str, ...]:
        """The settings whose share exceeds chance."""
        # The margin keeps rounding errors from counting as beyond chance.
        return tuple(n for n, share in self.shares.items() if share > self.by_chance[n] + 1e-9)


@dataclass(frozen=True)
class Level:
    """One value of a listed setting, and the losses of the sampled trials that had it."""

    value: Any
    num_trials: int
    best: float  # lowest val/text/nll at the common step
    median: float


def common_step(results: Results) -> int:
    """The last step reported by every sampled trial that completed or was pruned; 0 if there is none.

    If trials were stopped early, this is where the first of them stopped: later steps would compare only
    the survivors.
    """
    ended = [trial for trial in _sampled(results) if trial.status in ("completed", "pruned")]
    reached = [
        {step for step, _ in trial.curve(m.VAL_TEXT_NLL)} for trial in ended if trial.history
    ]
    return max(set.intersection(*reached), default=0) if reached else 0


def importance_info(results: Results) -> ImportanceInfo | None:
    """The share of every setting that varied; None with fewer than MIN_TRIALS comparable trials.

    Also None if no setting varied or all losses are equal.
    """
    step = common_step(results)
    trials, losses = _compared(results, step)
    if len(trials) < MIN_TRIALS:
        return None
    ranks_PN = _with_shuffles(_ranks(losses))
    found = {name: _shares(trials, name, ranks_PN) for name in SETTINGS}
    varied = {name: shares_P for name, shares_P in found.items() if shares_P is not None}
    if not varied:
        return None
    by_chance = _chance_thresholds({name: shares_P[1:] for name, shares_P in varied.items()})
    shares = {name: float(shares_P[0]) for name, shares_P in varied.items()}
    order = sorted(shares, key=lambda name: by_chance[name] - shares[name])
    return ImportanceInfo(
        shares={name: shares[name] for name in order},
        by_chance={name: by_chance[name] for name in order},
        step=step,
        num_trials=len(trials),
    )


def levels(results: Results, setting: str) -> list[Level]:
    """Text losses by value of a listed setting at the common step, lowest median first."""
    groups: dict[Any, list[float]] = {}
    for trial, loss in zip(*_compared(results, common_step(results)), strict=True):
        groups.setdefault(getattr(trial.config, setting), []).append(loss)
    found = [
        Level(value, len(group), min(group), statistics.median(group))
        for value, group in groups.items()
    ]
    return sorted(found, key=lambda level: level.median)


def _sampled(results: Results) -> list[Trial]:
    """Trials whose settings the search sampled and did not change during training.

    Trials 0 and 1 often lie far outside the searched ranges, so whatever they differ in would seem to
    matter. If settings changed during training, no single value led to the loss.
    """
    return [t for t in results.search if t.origin == "search" and not t.config.schedule]


def _compared(results: Results, step: int) -> tuple[list[Trial], list[float]]:
    """The sampled trials with a text loss at `step`, and those losses."""
    losses = [(trial, trial.at(step, m.VAL_TEXT_NLL)) for trial in _sampled(results)]
    known = [(trial, loss) for trial, loss in losses if loss is not None]
    return [trial for trial, _ in known], [loss for _, loss in known]


def _has_effect(trial: Trial, name: str) -> bool:
    return name != "new_module_lr_factor" or trial.config.cross_attention != "off"


def _with_shuffles(ranks_N: np.ndarray) -> np.ndarray:
    """The ranks as row 0, then `_NUM_SHUFFLES` shuffles of them, the same in each call."""
    shuffles_PN = np.tile(ranks_N, (_NUM_SHUFFLES, 1))
    return np.vstack([ranks_N, np.random.default_rng(0).permuted(shuffles_PN, axis=1)])


def _shares(trials: Sequence[Trial], name: str, ranks_PN: np.ndarray) -> np.ndarray | None:
    """The share of each row's variance that the setting explains, over trials in which it has an effect.

    None if it or the ranks did not vary, or if it has about as many values as trials, so that it explains
    any ranking.
    """
    acting = [index for index, trial in enumerate(trials) if _has_effect(trial, name)]
    values = [getattr(trials[index].config, name) for index in acting]
    if len(set(values)) < 2:
        return None
    effects_NK = _effects(values, name)
    if effects_NK.shape[1] >= len(values) - 1:
        return None
    ranks_PN = ranks_PN[:, acting]
    ranks_PN = ranks_PN - ranks_PN.mean(axis=1, keepdims=True)
    total_P = np.maximum((ranks_PN**2).sum(axis=1), 1e-9)  # 0 for equal losses
    shares_P = ((ranks_PN @ effects_NK) ** 2).sum(axis=1) / total_P
    return shares_P if shares_P.std() > 1e-9 else None


def _effects(values: Sequence[Any], name: str) -> np.ndarray:
    """Orthonormal basis of the setting's possible effects on ranks: a level per name, or a parabola.

    Numbers get a parabola over their rank, because the best value often lies inside the searched range.
    """
    if name in CATEGORICAL:
        columns_NK = np.array(
            [[v == known for known in sorted(set(values))] for v in values], float
        )
    else:
        place_N = _ranks(values) - (len(values) + 1) / 2
        columns_NK = np.stack([place_N, place_N**2], axis=1)
    columns_NK = columns_NK - columns_NK.mean(axis=0)
    basis_NK, sizes_K, _ = np.linalg.svd(columns_NK, full_matrices=False)
    return basis_NK[:, sizes_K > 1e-9 * sizes_K[0]]


def _ranks(values: Sequence[Any]) -> np.ndarray:
    """Ranks from 1; equal values get their mean rank."""
    _, places, counts = np.unique(
        np.asarray(values, float), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def _chance_thresholds(shuffled: dict[str, np.ndarray]) -> dict[str, float]:
    """The share that each setting must exceed, from its shares of the shuffled losses.

    Testing more settings makes a chance hit likelier, so the limit comes from the largest share in each
    shuffle. Shares are first standardised by their setting's mean and deviation, because a setting with
    many values fits shuffles better.
    Source: Westfall and Young, Resampling-Based Multiple Testing, 1993 (max-T).
    """
    means = {name: shares.mean() for name, shares in shuffled.items()}
    deviations = {name: shares.std() for name, shares in shuffled.items()}
    largest_P = np.max(
        [(shares - means[name]) / deviations[name] for name, shares in shuffled.items()], axis=0
    )
    limit = np.quantile(largest_P, _CONFIDENCE, method="higher")
    return {name: min(1.0, float(means[name] + limit * deviations[name])) for name in shuffled}
