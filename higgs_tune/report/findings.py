"""A sweep's findings as figures and sentences; nothing here draws or writes a file.

The sentences claim no more than the runs show: a difference within the noise of the seeds is called
that, and a text loss that fell without an audio gain is not called listening.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from higgs_tune import metrics as m
from higgs_tune.report.choose import Choice, Stat, choose, leader, mean_of
from higgs_tune.report.importance import (
    CATEGORICAL,
    MIN_TRIALS,
    ImportanceInfo,
    importance_info,
    levels,
)
from higgs_tune.report.notes import notes_on
from higgs_tune.report.results import UNFINISHED, Results, Trial
from higgs_tune.report.verdict import Outcome, found, headline, outcome_of
from higgs_tune.report.wording import (
    Answer,
    Tone,
    nats,
    plural,
    rise_percent,
    setting_name,
    signed,
)

# Audio gain, nats per text token: text ignores audio below GAIN_NONE, and clearly uses it from GAIN_CLEAR.
GAIN_NONE = 0.05
GAIN_CLEAR = 0.3
COMPARED = (m.VAL_TEXT_NLL, m.VAL_AUDIO_NLL, m.VAL_AUDIO_GAIN)


@dataclass(frozen=True)
class Findings:
    """Everything the summary and the report say in words."""

    outcome: Outcome
    headline: str
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]  # what a reader must know to trust the rest
    choice: Choice | None
    importance: ImportanceInfo | None


def find(results: Results) -> Findings:
    """Draw the conclusions from a sweep's results."""
    choice = choose(results)
    importance = importance_info(results)
    outcome = outcome_of(results, choice)
    answers = [found(results, choice, outcome)]
    if choice is not None and results.base is not None:
        answers += [
            _text(results.base, choice),
            _audio(results, results.base, choice),
            _listening(results.base, choice),
        ]
    if outcome != "no_trials":
        answers.append(_mattered(results, importance))
    return Findings(
        outcome=outcome,
        headline=headline(results, choice, outcome),
        answers=tuple(answers),
        notes=tuple(notes_on(results, choice)),
        choice=choice,
        importance=importance,
    )


def _text(base: dict[str, float], choice: Choice) -> Answer:
    start, end = base[m.VAL_TEXT_NLL], mean_of(choice.runs, m.VAL_TEXT_NLL)
    sentence = f"{signed(end - start)} nats per token against the untouched base"
    baseline = choice.baseline_stat(m.VAL_TEXT_NLL)
    if baseline is not None and choice.trial.origin != "baseline":
        sentence += f"; trial 0 ended at {nats(baseline.mean)}"
    figure = f"{nats(start)} → {nats(end)}"
    tone: Tone = "good" if end < start else "poor"
    return Answer("text", "How far did text loss fall?", figure, sentence + ".", tone)


def _audio(results: Results, base: dict[str, float], choice: Choice) -> Answer:
    start, end = base[m.VAL_AUDIO_NLL], mean_of(choice.runs, m.VAL_AUDIO_NLL)
    tolerance = 100 * results.sweep.objective.audio_tolerance
    rise = rise_percent(base, end)
    sentence = f"{signed(rise, 1)}%; a rise of {tolerance:.1f}% is allowed."
    figure = f"{nats(start)} → {nats(end)}"
    return Answer("audio", "What did audio loss do?", figure, sentence, "good")


def _listening(base: dict[str, float], choice: Choice) -> Answer:
    question = "Does text use audio now?"
    stat = choice.stat(m.VAL_AUDIO_GAIN)
    if stat is None:
        known = [run for run in choice.runs if run.last(m.VAL_AUDIO_GAIN) is not None]
        why = f"Only {len(known)} of {len(choice.runs)} runs ended with a finite audio gain."
        why = why if known else "No audio gain was reported."
        return Answer("listening", question, "unknown", why, "plain")
    start = base.get(m.VAL_AUDIO_GAIN)
    figure = (f"{nats(start)} → " if start is not None else "") + nats(stat.mean)
    # Rounded as printed, so that the sentence cannot contradict the figure.
    mean = round(stat.mean, 2)
    known = [gain for run in choice.runs if (gain := run.last(m.VAL_AUDIO_GAIN)) is not None]
    gains = sorted(round(gain, 2) for gain in known)
    means = f"after another clip's audio, text loss is {_rise(mean, gains)}"
    if mean >= GAIN_CLEAR and gains[0] >= GAIN_NONE:
        return Answer("listening", question, figure, f"Yes: {means}.", "good")
    if mean >= GAIN_NONE:
        return Answer("listening", question, figure, f"A little: {means}.", "fair")
    sentence = f"No: {means}."
    if mean_of(choice.runs, m.VAL_TEXT_NLL) < base[m.VAL_TEXT_NLL]:
        sentence += " The text loss fell by learning to write the language, not by listening."
    return Answer("listening", question, figure, sentence, "poor")


def _rise(mean: float, gains: list[float]) -> str:
    """How much text loss rises or falls after another clip's audio, and the range of the sorted `gains`."""
    text = f"{nats(abs(mean))} nats per token {'higher' if mean >= 0 else 'lower'}"
    if len(gains) == 1:
        return text
    low, high = (gains[0], gains[-1]) if mean >= 0 else (-gains[-1], -gains[0])
    return f"{text} ({nats(low)} to {nats(high)} over {len(gains)} seeds)"


def _mattered(results: Results, importance: ImportanceInfo | None) -> Answer:
    question = "Which setting mattered?"
    if importance is None:
        sentence = (
            f"Needs {MIN_TRIALS} sampled trials that reached a common step and differ in a setting."
        )
        return Answer("mattered", question, "too few trials", sentence, "plain")
    first = next(iter(importance.shares))
    share, chance = 100 * importance.shares[first], 100 * importance.by_chance[first]
    trials, step = f"{importance.num_trials} trials", f"step {importance.step}"
    num_steps = results.sweep.train.num_steps
    later = f" Effects that set in later, up to step {num_steps}, do not show there."
    later = later if importance.step < num_steps else ""
    if not importance.mattered:
        sentence = (
            f"{trials} cannot tell: by text loss at {step}, no setting stands out beyond chance. "
            f"Closest is {setting_name(first)}, {share:.0f}% where chance reaches {chance:.0f}%.{later}"
        )
        return Answer("mattered", question, "not clear", sentence, "plain")
    sentence = (
        f"That is its share of the ranking of {trials} by text loss at {step}; chance rarely "
        f"reaches more than {chance:.0f}%. {_others(importance)}{later}"
    )
    for name in (name for name in CATEGORICAL if name in importance.mattered):
        sentence += f" {_medians(results, name)}"
    figure = f"{setting_name(first)} {share:.0f}%"
    return Answer("mattered", question, figure, sentence, "plain")


def _others(importance: ImportanceInfo) -> str:
    others = [
        f"{setting_name(n)} {100 * importance.shares[n]:.0f}%" for n in importance.mattered[1:]
    ]
    return (
        f"Also beyond chance, or only sampled together with it: {', '.join(others)}."
        if others
        else "These trials cannot tell about the others."
    )


def _medians(results: Results, setting: str) -> str:
    by_value = [f"{level.value} {nats(level.median)}" for level in levels(results, setting)]
    return f"Median text loss with {setting} {', '.join(by_value)}."


def trial_counts(results: Results) -> str:
    """A phrase that counts the trials by how they ended."""
    words = {
        "completed": "ran to the end",
        "pruned": "stopped early",
        "out_of_memory": "ran out of memory",
        UNFINISHED: "running or lost",
    }
    counts = Counter(trial.status for trial in results.search)
    parts = [f"{count} {words.get(status, status)}" for status, count in counts.most_common()]
    text = f"{len(results.search)} in the search" + (f": {', '.join(parts)}" if parts else "")
    return text + (f"; {plural(len(results.confirm), 'confirm run')}" if results.confirm else "")


def comparison(results: Results, choice: Choice | None) -> list[tuple[str, list[Stat | None]]]:
    """Base, the two fixed configurations, and the best or leading trial: (label, stats of `COMPARED`)."""
    rows: list[tuple[str, list[Stat | None]]] = []
    if results.base is not None:
        rows.append(("base", [_single(results.base.get(name)) for name in COMPARED]))
    for trial in results.search:
        if trial.origin in ("baseline", "baseline_fixed") and trial.history:
            at = "" if trial.full_budget else f", {trial.status} at {trial.step}"
            label = f"{trial.id} {trial.config.cross_attention}, by hand{at}"
            stats = [_single(trial.last(name)) for name in COMPARED]
            if choice is not None and trial.origin == "baseline" and choice.baseline_runs:
                label += _seeds(choice, choice.baseline_runs)
                stats = [choice.baseline_stat(name) for name in COMPARED]
            rows.append((label, stats))
    if choice is not None:
        label = f"{choice.trial.id} best{_seeds(choice, choice.runs)}"
        rows.append((label, [choice.stat(name) for name in COMPARED]))
    elif (first := leader(results)) is not None and first.origin == "search":
        label = f"{first.id} ahead, {first.status} at {first.step}"
        rows.append((label, [_single(first.last(name)) for name in COMPARED]))
    return rows


def _seeds(choice: Choice, runs: Sequence[Trial]) -> str:
    """What to add to a label whose figures are those of confirm runs."""
    return f", {plural(len(runs), 'seed')}" if choice.confirm == "done" else ""


def _single(value: float | None) -> Stat | None:
    return None if value is None else Stat.of([value])
