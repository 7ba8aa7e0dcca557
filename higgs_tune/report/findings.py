"""What a sweep found, as figures and as sentences; nothing here draws or writes a file.

The sentences claim no more than the runs show: a difference inside the noise of the seeds is called
that, and a text loss that fell without an audio gain is not called listening.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from higgs_tune import metrics as m
from higgs_tune.config import TrialConfig
from higgs_tune.report.choose import Choice, Stat, choose
from higgs_tune.report.importance import MIN_TRIALS, ImportanceInfo, importance_info, levels
from higgs_tune.report.results import UNFINISHED, Results, Trial

# Nats per text token. Below the first, text does not use audio; from the second on it clearly does.
GAIN_NONE = 0.05
GAIN_CLEAR = 0.3

Outcome = Literal[
    "better", "within_noise", "worse", "unconfirmed", "baseline_best", "no_feasible", "no_trials"
]
Tone = Literal["good", "fair", "poor", "plain"]

OUTCOME_TONE: dict[Outcome, Tone] = {
    "better": "good",
    "within_noise": "fair",
    "worse": "fair",
    "unconfirmed": "fair",
    "baseline_best": "fair",
    "no_feasible": "poor",
    "no_trials": "poor",
}
_VERDICTS: dict[Outcome, str] = {
    "better": "Better than by hand",
    "within_noise": "No better than by hand",
    "worse": "Keeps audio, text less well",
    "unconfirmed": "Not confirmed",
    "baseline_best": "Trial 0 stays best",
    "no_feasible": "Nothing to choose",
    "no_trials": "Nothing yet",
}
SETTING_NAMES = {
    "learning_rate": "learning rate",
    "target_set": "target set",
    "new_module_lr_factor": "new-module rate factor",
    "text_loss_weight": "text loss weight",
    "audio_loss_weight": "audio loss weight",
    "batch_clips": "clips per step",
}


@dataclass(frozen=True)
class Answer:
    """One question that a reader brings, its figure and a sentence or two."""

    key: str
    question: str
    figure: str
    sentence: str
    tone: Tone


@dataclass(frozen=True)
class Findings:
    """Everything that the summary and the report say in words."""

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
    outcome = _outcome(results, choice)
    answers = [_found(results, choice, outcome)]
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
        headline=_headline(results, choice, outcome),
        answers=tuple(answers),
        notes=tuple(_notes(results, choice)),
        choice=choice,
        importance=importance,
    )


def describe(config: TrialConfig) -> str:
    """A configuration in one line."""
    return (
        f"rank {config.rank}, learning rate {config.learning_rate:.1e}, "
        f"cross_attention {config.cross_attention}, targets {' + '.join(config.targets)}"
    )


def nats(value: float) -> str:
    """A loss with the digits that mean something."""
    return f"{value:.2f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def setting_name(setting: str) -> str:
    """A setting's name in a sentence."""
    return SETTING_NAMES.get(setting, setting)


def _outcome(results: Results, choice: Choice | None) -> Outcome:
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


def _headline(results: Results, choice: Choice | None, outcome: Outcome) -> str:
    if outcome == "no_trials":
        return "No trial has reported a result yet"
    if choice is None or results.base is None:
        if not any(trial.full_budget for trial in results.search):
            return "No trial has run its full budget"
        return "No configuration kept audio within its limit over a full run"
    start, end = results.base[m.VAL_TEXT_NLL], _mean(choice, m.VAL_TEXT_NLL)
    verb = "fell" if end < start else "rose"
    return f"Text loss {verb} from {nats(start)} to {nats(end)} nats per token"


def _found(results: Results, choice: Choice | None, outcome: Outcome) -> Answer:
    question = "What was found?"
    tone = OUTCOME_TONE[outcome]
    if choice is None:
        why = _why_nothing(results, outcome)
        return Answer("found", question, _VERDICTS[outcome], why, tone)
    return Answer("found", question, _VERDICTS[outcome], _certainty(results, choice, outcome), tone)


def _certainty(results: Results, choice: Choice, outcome: Outcome) -> str:
    runs = f"{len(choice.runs)} fresh seeds" if len(choice.runs) > 1 else "one run"
    if outcome == "baseline_best":
        return f"Trial 0, the configuration set by hand, was not beaten ({runs})."
    difference = choice.difference
    if difference is None:
        return (
            "Trial 0 did not run the full budget with the same seed, so there is no fair comparison "
            "with it."
        )
    size = f"{nats(abs(difference.mean))} nats per token"
    direction = "lower" if difference.mean < 0 else "higher"
    if difference.interval is None:
        return (
            f"Its text loss is {size} {direction} than trial 0's in one pair of runs. How much of that "
            "is chance was not measured: the lowest of many single runs is partly luck."
        )
    low, high = difference.interval
    digits = 2 if high - low >= 0.05 else 3
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
    return (
        f"Its text loss does not differ from trial 0's beyond the noise of the seeds ({interval})."
    )


def _why_nothing(results: Results, outcome: Outcome) -> str:
    if outcome == "no_trials":
        return "The folder holds no report of any trial."
    ended = [trial for trial in results.search if trial.full_budget]
    if results.base is None:
        return "The untouched base was not evaluated, so the limit for audio is unknown."
    if not ended:
        return (
            "No trial ran the full budget with finite losses, and unequal budgets do not compare."
        )
    if any(results.feasible(trial) for trial in ended):
        return "What the search found did not hold up with the fresh seeds of the confirm stage."
    nearest = min(ended, key=lambda trial: trial.last(m.VAL_AUDIO_NLL) or 0.0)
    rise = _rise(results.base, nearest.last(m.VAL_AUDIO_NLL) or 0.0)
    tolerance = 100 * results.sweep.objective.audio_tolerance
    return (
        f"Every full run let audio loss rise by more than {tolerance:.1f}% (the least: {nearest.id}, "
        f"{signed(rise, 1)}%). Lower space.learning_rate.high, raise space.audio_loss_weight, or "
        "accept more with objective.audio_tolerance."
    )


def _text(base: dict[str, float], choice: Choice) -> Answer:
    start, end = base[m.VAL_TEXT_NLL], _mean(choice, m.VAL_TEXT_NLL)
    sentence = f"{signed(end - start)} nats per token against the untouched base"
    baseline = choice.baseline_stat(m.VAL_TEXT_NLL)
    if baseline is not None and choice.trial.origin != "baseline":
        sentence += f"; trial 0 ended at {nats(baseline.mean)}"
    figure = f"{nats(start)} → {nats(end)}"
    tone: Tone = "good" if end < start else "poor"
    return Answer("text", "How far did text loss fall?", figure, sentence + ".", tone)


def _audio(results: Results, base: dict[str, float], choice: Choice) -> Answer:
    start, end = base[m.VAL_AUDIO_NLL], _mean(choice, m.VAL_AUDIO_NLL)
    tolerance = 100 * results.sweep.objective.audio_tolerance
    rise = _rise(base, end)
    sentence = f"{signed(rise, 1)}%; a rise of {tolerance:.1f}% is allowed."
    figure = f"{nats(start)} → {nats(end)}"
    return Answer("audio", "What did audio loss do?", figure, sentence, "good")


def _listening(base: dict[str, float], choice: Choice) -> Answer:
    question = "Does text use audio now?"
    gain = choice.stat(m.VAL_AUDIO_GAIN)
    if gain is None:
        return Answer("listening", question, "unknown", "No audio gain was reported.", "plain")
    start = base.get(m.VAL_AUDIO_GAIN)
    figure = (f"{nats(start)} → " if start is not None else "") + nats(gain.mean)
    worse = "higher" if gain.mean >= 0 else "lower"
    means = (
        f"after another clip's audio, text loss is {nats(abs(gain.mean))} nats per token {worse}"
    )
    if gain.mean >= GAIN_CLEAR:
        return Answer("listening", question, figure, f"Yes: {means}.", "good")
    if gain.mean >= GAIN_NONE:
        return Answer("listening", question, figure, f"A little: {means}.", "fair")
    sentence = f"No: {means}."
    if _mean(choice, m.VAL_TEXT_NLL) < base[m.VAL_TEXT_NLL]:
        sentence += " The text loss fell by learning to write the language, not by listening."
    return Answer("listening", question, figure, sentence, "poor")


def _mattered(results: Results, importance: ImportanceInfo | None) -> Answer:
    question = "Which setting mattered?"
    if importance is None:
        sentence = f"Needs {MIN_TRIALS} trials that reached a common step and differ in a setting."
        return Answer("mattered", question, "too few trials", sentence, "plain")
    shares = [(setting_name(key), 100 * share) for key, share in importance.shares.items()]
    others = ", ".join(f"{name} {share:.0f}%" for name, share in shares[1:4])
    sentence = f"Then {others}. " if others else "Nothing else varied. "
    values = levels(results, "cross_attention")
    if len(values) > 1:
        best = ", ".join(f"{level.value} {nats(level.best)}" for level in values)
        sentence += f"Lowest text loss with cross_attention {best}. "
    sentence += f"From {importance.num_trials} trials at step {importance.step}: a rough order."
    name, share = shares[0]
    return Answer("mattered", question, f"{name} {share:.0f}%", sentence, "plain")


def _notes(results: Results, choice: Choice | None) -> list[str]:
    notes = []
    open_ends = {
        "running or lost": results.count(UNFINISHED),
        "cancelled": results.count("cancelled"),
    }
    if any(open_ends.values()):
        counts = ", ".join(f"{count} {word}" for word, count in open_ends.items() if count)
        notes.append(f"The sweep is not finished. Its trials: {counts}.")
    if choice is not None and choice.confirm == "skipped":
        notes.append("The confirm stage was switched off (confirm.num_configs is 0).")
    if choice is not None and choice.confirm == "unfinished":
        notes.append("The confirm stage has not finished; the choice rests on the search alone.")
    baseline = results.baseline
    if baseline is not None and baseline.history and not baseline.full_budget:
        last = baseline.last(m.VAL_TEXT_NLL)
        at = f" with a text loss of {nats(last)}" if last is not None else ""
        notes.append(f"Trial 0 ended {baseline.status} at step {baseline.step}{at}.")
    if choice is not None and not (choice.adapter_run.directory / "adapter").is_dir():
        notes.append(f"{choice.adapter_run.id} left no adapter; train it again to get one.")
    return notes


def trial_counts(results: Results) -> str:
    """How the trials ended, in words."""
    words = {
        "completed": "ran to the end",
        "pruned": "stopped early",
        "out_of_memory": "ran out of memory",
    }
    counts = Counter(trial.status for trial in results.search)
    parts = [f"{count} {words.get(status, status)}" for status, count in counts.most_common()]
    text = f"{len(results.search)} in the search" + (f": {', '.join(parts)}" if parts else "")
    return text + (f"; {len(results.confirm)} confirm runs" if results.confirm else "")


def comparison(results: Results, choice: Choice | None) -> list[tuple[str, dict[str, Stat | None]]]:
    """Base, the two fixed configurations and the best: (label, metric → statistics)."""
    names = (m.VAL_TEXT_NLL, m.VAL_AUDIO_NLL, m.VAL_AUDIO_GAIN)
    rows: list[tuple[str, dict[str, Stat | None]]] = []
    if results.base is not None:
        base = {name: results.base.get(name) for name in names}
        rows.append(("base", {k: None if v is None else Stat.of([v]) for k, v in base.items()}))
    for trial in results.search:
        if trial.origin in ("baseline", "baseline_fixed") and trial.history:
            at = "" if trial.full_budget else f", {trial.status} at {trial.step}"
            label = f"{trial.id} {trial.config.cross_attention}, by hand{at}"
            stats = {name: _last(trial, name) for name in names}
            if choice is not None and trial.origin == "baseline" and len(choice.baseline_runs) > 1:
                label += f", {len(choice.baseline_runs)} seeds"
                stats = {name: choice.baseline_stat(name) for name in names}
            rows.append((label, stats))
    if choice is not None:
        over = f", {len(choice.runs)} seeds" if len(choice.runs) > 1 else ""
        rows.append((f"{choice.trial.id} best{over}", {name: choice.stat(name) for name in names}))
    return rows


def _last(trial: Trial, metric: str) -> Stat | None:
    value = trial.last(metric)
    return None if value is None else Stat.of([value])


def _mean(choice: Choice, metric: str) -> float:
    stat = choice.stat(metric)
    assert stat is not None, f"{metric} is missing in a full-budget run"
    return stat.mean


def _rise(base: dict[str, float], audio: float) -> float:
    """Change of the audio loss in percent of its start."""
    return 100 * (audio / base[m.VAL_AUDIO_NLL] - 1)
