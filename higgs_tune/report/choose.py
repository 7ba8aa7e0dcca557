"""Choose the best configuration and measure how certain the choice is.

Only feasible trials that ran the full budget are candidates: losses at different steps are not
comparable. Once the confirm stage has run, the mean over its fresh seeds decides, because the lowest of
many single runs is partly luck.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from higgs_tune import metrics as m
from higgs_tune.report.results import OPEN, Results, Trial
from higgs_tune.report.wording import digits_apart, nats, plural

ConfirmState = Literal["done", "skipped", "unfinished"]

# Student's t, two-sided 95 %, by degrees of freedom
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t_95(freedom: int) -> float:
    """Student's t, two-sided 95 %; beyond the table, a series with an error below 0.0002.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation of n runs; `sd` is None for one run."""

    mean: float
    sd: float | None
    n: int

    @staticmethod
    def of(values: Iterable[float]) -> "Stat":
        """Statistics of one or more values."""
        listed = list(values)
        sd = statistics.stdev(listed) if len(listed) > 1 else None
        return Stat(statistics.fmean(listed), sd, len(listed))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95 % confidence interval (Student's t); None for one run."""
        if self.sd is None:
            return None
        half = _t_95(self.n - 1) * self.sd / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain data for JSON and YAML."""
        return {"mean": self.mean, "sd": self.sd, "n": self.n}


@dataclass(frozen=True)
class Choice:
    """The best configuration, and the runs its figures are averaged over."""

    trial: Trial  # the search trial with this configuration
    runs: tuple[Trial, ...]  # its confirm runs, or the trial alone
    baseline_runs: tuple[Trial, ...]  # the same for trial 0; only runs of the full budget
    confirm: ConfirmState
    # its adapter is exported: of `runs` within the audio limit, the one with the lowest text loss
    adapter_run: Trial
    difference: Stat | None  # val/text/nll minus the baseline's, paired by seed; below 0 is better

    def stat(self, metric: str) -> Stat | None:
        """The metric over `runs`; None if any run ended without a finite value."""
        return _stat(self.runs, metric)

    def baseline_stat(self, metric: str) -> Stat | None:
        """The metric over `baseline_runs`; None as for `stat`, or if there are none."""
        return _stat(self.baseline_runs, metric)


def choose(results: Results) -> Choice | None:
    """The best feasible full-budget configuration; None if there is none.

    Also None if the confirm stage has run and every configuration failed it.
    """
    candidates = [t for t in results.search if t.full_budget and results.feasible(t)]
    if not candidates:
        return None
    first = min(candidates, key=_text_nll)
    state = _confirm_state(results)
    if state != "done":
        baseline = results.baseline
        baseline_runs = (baseline,) if baseline is not None and baseline.full_budget else ()
        return _choice(results, first, (first,), baseline_runs, state)

    groups = confirmed(results)
    by_id = {trial.id: trial for trial in results.search}
    failed = failed_in_confirm(results)
    held = {key: runs for key, runs in groups.items() if key not in failed}
    if not held:
        return None
    winner = min(held, key=lambda key: mean_of(held[key], m.VAL_TEXT_NLL))
    baseline_id = results.baseline.id if results.baseline else ""
    baseline_runs = tuple(run for run in groups.get(baseline_id, ()) if run.full_budget)
    return _choice(results, by_id[winner], held[winner], baseline_runs, "done")


def leader(results: Results) -> Trial | None:
    """The best trial so far within the audio limit; None once any trial has run the full budget.

    Best means the lowest text loss among the trials that have got furthest.
    """
    if any(trial.full_budget for trial in results.search):
        return None
    healthy = [
        trial
        for trial in results.search
        if results.feasible(trial) and trial.last(m.VAL_TEXT_NLL) is not None
    ]
    furthest = max((trial.step for trial in healthy), default=0)
    return min((t for t in healthy if t.step == furthest), key=_text_nll, default=None)


def _confirm_state(results: Results) -> ConfirmState:
    """Whether the confirm runs of trial 0 and of the best other candidate decide."""
    if results.sweep.confirm.num_configs == 0:
        return "skipped"
    return "done" if _rivals(results) <= confirmed(results).keys() else "unfinished"


def _rivals(results: Results) -> set[str]:
    """Ids of trial 0 and of the best other candidate.

    Other trials may never get all runs: extending a sweep can change which ones it confirms.
    """
    others = [
        trial
        for trial in results.search
        if trial.full_budget and results.feasible(trial) and trial.origin != "baseline"
    ]
    best = min(others, key=_text_nll, default=None)
    return {results.baseline.id if results.baseline else "t000"} | ({best.id} if best else set())


def _groups(results: Results) -> dict[str, tuple[Trial, ...]]:
    """Confirm runs that have ended, by the id of the search trial they confirm."""
    groups: dict[str, tuple[Trial, ...]] = {}
    for run in results.confirm:
        assert run.confirms is not None, f"{run.id} confirms no trial"
        if run.status not in OPEN:
            groups[run.confirms] = (*groups.get(run.confirms, ()), run)
    return groups


def confirmed(results: Results) -> dict[str, tuple[Trial, ...]]:
    """Ids of confirmed search trials, each with its runs on the seeds they all share.

    Those with all seeds; until trial 0 and the best other candidate are among them, those with as many as
    these two have, if that is two or more. So seeds that are added do not hide the ones before. Means over
    different seeds are not comparable, and some trials have more if confirm.num_seeds was lowered.
    """
    wanted, rivals = results.sweep.confirm.num_seeds, _rivals(results)
    for num_seeds in range(wanted, 1, -1):
        found = _on_shared_seeds(results, num_seeds)
        if rivals <= found.keys():
            return found
    return _on_shared_seeds(results, wanted)


def _on_shared_seeds(results: Results, num_seeds: int) -> dict[str, tuple[Trial, ...]]:
    """Trials with so many confirm runs or more, and their runs on the seeds they all share, if as many."""
    complete = {key: runs for key, runs in _groups(results).items() if len(runs) >= num_seeds}
    seeds = [{run.config.seed for run in runs} for runs in complete.values()]
    shared = set.intersection(*seeds) if seeds else set()
    if len(shared) < num_seeds:  # a cancelled run still has to be resumed
        return {}
    return {
        key: tuple(run for run in runs if run.config.seed in shared)
        for key, runs in complete.items()
    }


def failed_in_confirm(results: Results) -> dict[str, str]:
    """Ids of the search trials that failed the confirm stage, each with the reason.

    To pass, every run must reach the full budget and their mean audio loss must be within the limit.
    """
    failed = {}
    for trial_id, runs in confirmed(results).items():
        broken = Counter(run.status for run in runs if not run.full_budget)
        if broken:
            ends = ", ".join(f"{count} {status}" for status, count in sorted(broken.items()))
            failed[trial_id] = (
                f"not all of its {plural(len(runs), 'confirm run')} reached the full budget ({ends})"
            )
        elif results.audio_limit is None:
            failed[trial_id] = "the limit for audio is unknown"
        elif (audio := mean_of(runs, m.VAL_AUDIO_NLL)) > results.audio_limit:
            digits = digits_apart(audio, results.audio_limit, 2)
            failed[trial_id] = (
                f"its audio loss, {nats(audio, digits)} over {plural(len(runs), 'seed')}, is beyond the "
                f"limit of {nats(results.audio_limit, digits)}"
            )
    return failed


def _choice(
    results: Results,
    trial: Trial,
    runs: tuple[Trial, ...],
    baseline_runs: tuple[Trial, ...],
    state: ConfirmState,
) -> Choice:
    # If the mean is within the limit, so is at least one run.
    best = min(runs, key=lambda run: (not results.feasible(run), _text_nll(run)))
    by_seed = {run.config.seed: _text_nll(run) for run in baseline_runs}
    pairs = [
        _text_nll(run) - by_seed[run.config.seed]
        for run in runs
        if run.config.seed in by_seed and trial.origin != "baseline"
    ]
    difference = Stat.of(pairs) if pairs else None
    return Choice(trial, runs, baseline_runs, state, best, difference)


def _text_nll(trial: Trial) -> float:
    value = trial.last(m.VAL_TEXT_NLL)
    assert value is not None, f"{trial.id} ended without a text loss"
    return value


def mean_of(runs: Iterable[Trial], metric: str) -> float:
    """Mean final loss of full-budget runs, all of which have one."""
    stat = _stat(runs, metric)
    assert stat is not None, f"{metric} is missing in a full-budget run"
    return stat.mean


def _stat(runs: Iterable[Trial], metric: str) -> Stat | None:
    values = [run.last(metric) for run in runs]
    known = [value for value in values if value is not None]
    return Stat.of(known) if known and len(known) == len(values) else None
