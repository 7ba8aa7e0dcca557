"""What a reader must know to trust a sweep's answers: what is missing, interrupted or left out."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from higgs_tune import metrics as m
from higgs_tune.report.choose import Choice, confirmed, failed_in_confirm
from higgs_tune.report.results import OPEN, UNFINISHED, Results, Trial, adapter_of
from higgs_tune.report.wording import nats, plural


def notes_on(results: Results, choice: Choice | None) -> list[str]:
    """All notes, a sentence or two each."""
    notes = []
    num_trials = results.sweep.tune.num_trials
    if open_ends := _resumable_counts(results.search):
        notes.append(
            f"The sweep is not finished: {open_ends}. --resume continues what was cancelled or lost."
        )
    elif 0 < len(results.search) < num_trials:
        notes.append(f"The search ended after {len(results.search)} of {num_trials} trials.")
    if choice is not None and choice.confirm == "skipped":
        notes.append("The confirm stage was switched off (confirm.num_configs is 0).")
    if choice is not None and choice.confirm == "unfinished":
        notes.append("The confirm stage has not finished; the choice rests on the search alone.")
    num_seeds = results.sweep.confirm.num_seeds
    if choice is not None and choice.confirm == "done" and len(choice.runs) < num_seeds:
        notes.append(
            f"The confirm stage has run {len(choice.runs)} of {num_seeds} seeds for trial 0 and the best of "
            "the search; --resume runs the others."
        )
    done = confirmed(results)  # these may have open runs if confirm.num_seeds was lowered
    if open_ends := _resumable_counts(run for run in results.confirm if run.confirms not in done):
        notes.append(
            f"Unfinished confirm runs: {open_ends}. A configuration without all its runs is not "
            "confirmed; --resume continues them."
        )
    if choice is None or choice.confirm == "done":
        notes += [
            f"{trial_id} was confirmed and cannot be chosen: {why}."
            for trial_id, why in failed_in_confirm(results).items()
        ]
    notes += _broken(results.trials)
    notes += _diverged(results.search)
    notes += _pruned_all_feasible(results)
    if results.baseline is not None:
        notes += _baseline_ended_early(results.baseline)
    if choice is not None and adapter_of(results, choice.adapter_run) is None:
        notes.append(f"{choice.adapter_run.id} left no adapter; train it again to get one.")
    return notes


def _broken(trials: Sequence[Trial]) -> list[str]:
    """A note for each kind of end that says nothing about a configuration's quality, with one reason."""
    words = {"failed": "failed", "out_of_memory": "ran out of memory", "cancelled": "cancelled"}
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        # The reason names an interrupt, or that Ray Tune gave up; each trial's own error follows the colon.
        kind = trial.reason.partition(":")[0] if trial.status == "cancelled" else ""
        groups.setdefault((trial.status, kind), []).append(trial)
    notes = []
    for (status, _), own in groups.items():
        if status in words:
            reason = textwrap.shorten(own[0].reason or "no reason was recorded", 200)
            notes.append(
                f"{plural(len(own), 'trial')} {words[status]}. Reason of {own[0].id}: {reason}"
            )
    return notes


def _diverged(trials: Sequence[Trial]) -> list[str]:
    """A note where more than half of the trials that ended had diverged."""
    ended = [trial for trial in trials if trial.status not in OPEN]
    diverged = [trial for trial in ended if trial.status == "diverged"]
    if 2 * len(diverged) <= len(ended):
        return []
    reason = textwrap.shorten(diverged[0].reason or "no reason was recorded", 200)
    return [
        f"{len(diverged)} of {plural(len(ended), 'trial')} diverged. Reason of {diverged[0].id}: {reason}. "
        "Lower space.learning_rate."
    ]


def _pruned_all_feasible(results: Results) -> list[str]:
    """A note if early stopping, which sees only text loss, left no sampled trial to choose."""
    sampled = [trial for trial in results.search if trial.origin == "search"]
    ended = [results.feasible(trial) for trial in sampled if trial.full_budget]
    stopped = [t for t in sampled if t.status == "pruned" and results.feasible(t)]
    if not stopped or not ended or any(within is not False for within in ended):
        return []
    return [
        f"Every sampled trial that ran to its end ({len(ended)}) let audio loss rise beyond its limit; "
        f"{len(stopped)} within it had been stopped early, which goes by text loss alone. "
        "tune.scheduler.name: none lets all run; space.learning_rate may reach too high."
    ]


def _baseline_ended_early(baseline: Trial) -> list[str]:
    """A note if trial 0 ended before its full budget; none while it is running."""
    if not baseline.history or baseline.full_budget or baseline.status == UNFINISHED:
        return []
    last = baseline.last(m.VAL_TEXT_NLL)
    at = f" with a text loss of {nats(last)}" if last is not None else ""
    ended = "was cancelled" if baseline.status == "cancelled" else f"ended {baseline.status}"
    return [f"Trial 0 {ended} at step {baseline.step}{at}."]


def _resumable_counts(trials: Iterable[Trial]) -> str:
    """How many of the trials --resume would continue, in words; empty if none."""
    counts = Counter(trial.status for trial in trials)
    words = {UNFINISHED: "running or lost", "cancelled": "cancelled"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
