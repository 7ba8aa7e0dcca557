"""Whether the best configuration beats the one set by hand, and how certain that is."""

from typing import Literal

from higgs_tune import metrics as m
from higgs_tune.report.choose import Choice, leader, mean_of
from higgs_tune.report.results import OPEN, Results
from higgs_tune.report.wording import Answer, Tone, digits_apart, nats, rise_percent, signed

Outcome = Literal[
    "better", "within_noise", "worse", "unconfirmed", "baseline_best", "no_feasible", "no_trials"
]
_VERDICTS: dict[Outcome, tuple[str, Tone]] = {
    "better": ("Better than by hand", "good"),
    "within_noise": ("Not clearly better than by hand", "fair"),
    "worse": ("Keeps audio, but text is worse", "fair"),
    "unconfirmed": ("Not confirmed", "fair"),
    "baseline_best": ("Trial 0 stays best", "fair"),
    "no_feasible": ("Nothing to choose", "poor"),
    "no_trials": ("Nothing reported", "poor"),
}


def outcome_of(results: Results, choice: Choice | None) -> Outcome:
    """How the best configuration of the search compares with the one set by hand."""
    if choice is None:
        return "no_feasible" if any(trial.history for trial in results.trials) else "no_trials"
    if choice.trial.origin == "baseline":
        return "baseline_best"
    if choice.difference is None or choice.difference.interval is None:
        return "unconfirmed"
    low, high = choice.difference.interval
    if high < 0:
        return "better"
    return "worse" if low > 0 else "within_noise"


def headline(results: Results, choice: Choice | None, outcome: Outcome) -> str:
    """The report's title."""
    if outcome == "no_trials":
        over = results.trials and all(t.status not in OPEN for t in results.trials)
        return "No trial reported a result" if over else "No trial has reported a result yet"
    if choice is None or results.base is None:
        if not any(trial.full_budget for trial in results.search):
            return "No trial has run its full budget"
        if results.base is None:
            return "The limit for audio loss is unknown"
        if any(trial.full_budget and results.feasible(trial) for trial in results.search):
            return "No configuration held up in the confirm stage"
        return "No configuration kept audio within its limit over a full run"
    start, end = results.base[m.VAL_TEXT_NLL], mean_of(choice.runs, m.VAL_TEXT_NLL)
    if nats(start) == nats(end):
        return f"Text loss stayed at {nats(end)} nats per token"
    verb = "fell" if end < start else "rose"
    return f"Text loss {verb} from {nats(start)} to {nats(end)} nats per token"


def found(results: Results, choice: Choice | None, outcome: Outcome) -> Answer:
    """The answer to what was found, and how certain that is."""
    figure, tone = _VERDICTS[outcome]
    if choice is None:
        sentence = _why_nothing(results, outcome)
    else:
        sentence = _certainty(results, choice, outcome)
        if choice.trial.origin == "baseline_fixed":  # trial 1 was set by hand, too
            figure = figure.replace("by hand", "trial 0")
    return Answer("found", "What was found?", figure, sentence, tone)


def _certainty(results: Results, choice: Choice, outcome: Outcome) -> str:
    runs = f"{len(choice.runs)} fresh seeds" if len(choice.runs) > 1 else "one run"
    if outcome == "baseline_best":
        others = [t for t in results.search if t.full_budget and t.origin != "baseline"]
        if not any(results.feasible(trial) for trial in others):
            return (
                "Trial 0, the configuration set by hand, is the only one that ran the full budget within "
                f"the audio limit ({runs})."
            )
        return f"Trial 0, the configuration set by hand, was not beaten ({runs})."
    difference = choice.difference
    if difference is None:
        if not choice.baseline_runs:
            who = "None of trial 0's confirm runs" if choice.confirm == "done" else "Trial 0 never"
            return f"{who} reached the full budget, so there is no fair comparison with it."
        why = "is switched off" if choice.confirm == "skipped" else "has not finished"
        return (
            f"Trial 0 ran with another seed. Only the confirm stage, which {why}, would tell how much of "
            "the difference is chance."
        )
    mean = abs(difference.mean)
    size = f"{nats(mean, digits_apart(mean, 0, 2) if mean else 2)} nats per token"
    direction = "lower" if difference.mean < 0 else "higher"
    if difference.interval is None:
        return (
            f"Its text loss is {size} {direction} than trial 0's in one pair of runs. How much of that "
            "is chance was not measured: the lowest of many single runs is partly luck."
        )
    low, high = difference.interval
    digits = 2 if high - low >= 0.05 else 3
    # An end that is shown as 0 would not say on which side of it the interval ends.
    digits = max([digits, *(digits_apart(abs(end), 0, 2) for end in (low, high) if end)])
    ends = f"{signed(low, digits)} to {signed(high, digits)}"
    interval = f"95% interval {ends}, {difference.n} seeds"
    if outcome == "better":
        return f"Its text loss is {size} lower than trial 0's ({interval})."
    if outcome == "worse":
        audio, limit = choice.baseline_stat(m.VAL_AUDIO_NLL), results.audio_limit
        over = audio is not None and limit is not None and audio.mean > limit
        why = "let audio loss rise beyond its limit" if over else "did not end well with every seed"
        return (
            f"Its text loss is {size} higher than trial 0's ({interval}). Trial 0 could not be "
            f"chosen: it {why}."
        )
    sentence = (
        f"Its text loss does not differ from trial 0's beyond the noise of the seeds ({interval})."
    )
    if difference.n == 2:
        sentence += (
            " Two seeds usually miss even a difference of five times that noise: "
            "--resume with a higher confirm.num_seeds."
        )
    return sentence


def _why_nothing(results: Results, outcome: Outcome) -> str:
    if outcome == "no_trials":
        return "The folder holds no report of any trial."
    ended = [trial for trial in results.search if trial.full_budget]
    if results.base is None:
        return "The untouched base was not evaluated, so the limit for audio is unknown."
    if not ended:
        num_steps = results.sweep.train.num_steps
        sentence = (
            f"No trial has run all {num_steps} steps with finite losses, and trials of unequal length "
            "cannot be compared."
        )
        if (first := leader(results)) is not None:
            sentence += (
                f" Of those that came furthest, to step {first.step}, {first.id} is ahead with a text "
                f"loss of {nats(first.last(m.VAL_TEXT_NLL) or 0.0)}."
            )
        return sentence
    if any(results.feasible(trial) for trial in ended):
        return "What the search found did not hold up with the fresh seeds of the confirm stage."
    nearest = min(ended, key=lambda trial: trial.last(m.VAL_AUDIO_NLL) or 0.0)
    rise = rise_percent(results.base, nearest.last(m.VAL_AUDIO_NLL) or 0.0)
    tolerance = 100 * results.sweep.objective.audio_tolerance
    digits = digits_apart(rise, tolerance, 1)
    return (
        f"Every full run let audio loss rise by more than {tolerance:.{digits}f}% (the least: "
        f"{nearest.id}, {signed(rise, digits)}%). Lower space.learning_rate, raise "
        "space.audio_loss_weight, or accept more with objective.audio_tolerance."
    )
