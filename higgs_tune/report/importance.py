"""Which setting mattered: how much of the trials' ranking by text loss goes with each, beside chance.

With the few trials of a sweep some setting always seems to decide, so each share stands beside what it
comes to when the losses are dealt out anew. Ranks, because one bad trial's loss would outweigh all others.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from higgs_tune import metrics as m
from higgs_tune.report.results import Results, Trial

MIN_TRIALS = 8  # with fewer, hardly any effect would stand out
SETTINGS = (
    "learning_rate",
    "rank",
    "target_set",
    "cross_attention",
    "alpha",
    "alpha_rule",
    "new_module_lr_factor",
    "dropout",
    "text_loss_weight",
    "audio_loss_weight",
    "batch_clips",
)
NAMES = ("target_set", "cross_attention", "alpha_rule")  # settings whose values have no order
_NUM_SHUFFLES = 1000
_CONFIDENCE = 0.95  # of all settings together: one sweep in 20 names one by chance


@dataclass(frozen=True)
class ImportanceInfo:
    """Each varied setting's share of the trials' ranking by text loss, what stands out most first.

    Shares lie between 0 and 1; they overlap, so their sum means nothing.
    """

    shares: dict[str, float]
    by_chance: dict[str, float]  # what a share must exceed; allows for the best of all settings
    step: int  # the losses compared are those of this step
    num_trials: int

    @property
    def mattered(self) -> tuple[str, ...]:
        """The settings whose share exceeds chance."""
        # equal but for rounding is not beyond
        return tuple(n for n, share in self.shares.items() if share > self.by_chance[n] + 1e-9)


@dataclass(frozen=True)
class Level:
    """One value of a setting that is chosen from a list, and the sampled trials that had it."""

    value: Any
    num_trials: int
    best: float  # lowest val/text/nll at the common step
    median: float


def common_step(results: Results) -> int:
    """The latest step that every sampled trial reached which was not broken off; 0 if there is none.

    Where some were stopped early it is the first rung: later ones compare the survivors only.
    """
    ended = [trial for trial in _sampled(results) if trial.status in ("completed", "pruned")]
    reached = [
        {step for step, _ in trial.curve(m.VAL_TEXT_NLL)} for trial in ended if trial.history
    ]
    return max(set.intersection(*reached), default=0) if reached else 0


def importance_info(results: Results) -> ImportanceInfo | None:
    """The share of every setting that varied; None with fewer than MIN_TRIALS comparable trials.

    None, too, if no setting varied, or the losses did not.
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
    by_chance = _by_chance({name: shares_P[1:] for name, shares_P in varied.items()})
    shares = {name: float(shares_P[0]) for name, shares_P in varied.items()}
    order = sorted(shares, key=lambda name: by_chance[name] - shares[name])
    return ImportanceInfo(
        shares={name: shares[name] for name in order},
        by_chance={name: by_chance[name] for name in order},
        step=step,
        num_trials=len(trials),
    )


def levels(results: Results, setting: str) -> list[Level]:
    """How each value of a listed setting did at the common step, the lowest median first."""
    groups: dict[Any, list[float]] = {}
    for trial, loss in zip(*_compared(results, common_step(results)), strict=True):
        groups.setdefault(getattr(trial.config, setting), []).append(loss)
    found = [
        Level(value, len(group), min(group), statistics.median(group))
        for value, group in groups.items()
    ]
    return sorted(found, key=lambda level: level.median)


def _sampled(results: Results) -> list[Trial]:
    """Trials whose settings the search drew and kept to the end.

    Trials 0 and 1 often lie outside the searched ranges, far from all others: whatever they differ in
    would seem to matter. Where settings changed on the way, none of them led to the loss.
    """
    return [t for t in results.search if t.origin == "search" and not t.config.schedule]


def _compared(results: Results, step: int) -> tuple[list[Trial], list[float]]:
    """The sampled trials with a text loss at `step`, and those losses."""
    losses = [(trial, trial.at(step, m.VAL_TEXT_NLL)) for trial in _sampled(results)]
    known = [(trial, loss) for trial, loss in losses if loss is not None]
    return [trial for trial, _ in known], [loss for _, loss in known]


def _acts(trial: Trial, name: str) -> bool:
    return name != "new_module_lr_factor" or trial.config.cross_attention != "off"


def _with_shuffles(ranks_N: np.ndarray) -> np.ndarray:
    """The ranks, and below them as many shuffles as chance is judged by; the same ones each time."""
    shuffles_PN = np.tile(ranks_N, (_NUM_SHUFFLES, 1))
    return np.vstack([ranks_N, np.random.default_rng(0).permuted(shuffles_PN, axis=1)])


def _shares(trials: Sequence[Trial], name: str, ranks_PN: np.ndarray) -> np.ndarray | None:
    """The share of each row's variance that goes with the setting, among trials in which it acts.

    None if it did not vary, or has about as many values as trials and so goes with any ranking.
    """
    acting = [index for index, trial in enumerate(trials) if _acts(trial, name)]
    values = [getattr(trials[index].config, name) for index in acting]
    if len(set(values)) < 2:
        return None
    effects_NK = _effects(values, name)
    if effects_NK.shape[1] >= len(values) - 1:
        return None
    ranks_PN = ranks_PN[:, acting]
    ranks_PN = ranks_PN - ranks_PN.mean(axis=1, keepdims=True)
    total_P = np.maximum((ranks_PN**2).sum(axis=1), 1e-9)  # 0 for equal losses, which explain none
    shares_P = ((ranks_PN @ effects_NK) ** 2).sum(axis=1) / total_P
    return shares_P if shares_P.std() > 1e-9 else None


def _effects(values: Sequence[Any], name: str) -> np.ndarray:
    """An orthonormal basis of what the setting can do to ranks: a level for each name, or a parabola.

    A parabola over a number's rank, because the best value often lies amid the searched ones.
    """
    if name in NAMES:
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
    """Ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(
        np.asarray(values, float), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def _by_chance(shuffled: dict[str, np.ndarray]) -> dict[str, float]:
    """The share that each setting must exceed, by its shares of the shuffled losses.

    Chance has as many tries as there are settings. So the limit is that of the largest of them, each
    measured by its own mean and deviation, because a setting with many values fits shuffles better.
    Source: Westfall and Young, Resampling-Based Multiple Testing, 1993 (max-T).
    """
    means = {name: shares.mean() for name, shares in shuffled.items()}
    deviations = {name: shares.std() for name, shares in shuffled.items()}
    largest_P = np.max(
        [(shares - means[name]) / deviations[name] for name, shares in shuffled.items()], axis=0
    )
    limit = np.quantile(largest_P, _CONFIDENCE, method="higher")
    return {name: min(1.0, float(means[name] + limit * deviations[name])) for name in shuffled}
