"""Build report.html: one self-contained file for light and dark mode, with the answers on top."""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from higgs_tune.report.choose import Stat
from higgs_tune.report.findings import COMPARED, Findings, comparison, trial_counts
from higgs_tune.report.importance import common_step, levels
from higgs_tune.report.ink import Picture
from higgs_tune.report.listening import Listening, listening_section
from higgs_tune.report.plots import role
from higgs_tune.report.results import Results, Trial
from higgs_tune.report.template import escape as _e
from higgs_tune.report.template import fill
from higgs_tune.report.wording import Answer, describe, measured, nats, signed
from higgs_tune.report.workers import workers_sentence

CAPTIONS = {
    "curves": "Held-out losses by step; every trial starts at the untouched base. Audio gain is text loss "
    "after another clip's audio minus text loss after its own: at 0, text does not listen. A curve that ends "
    "in an arrowhead leaves the scale, which is cut so that far worse trials do not squeeze the others.",
    "scatter": "Lower is better text, further left is better audio. Only full runs inside the shaded area "
    "can be chosen. A trial far worse than the rest is drawn on the edge of the scale; its losses are in the "
    "legend and in the table.",
    "gain": "Text loss can fall by learning to write the language without listening. These bars tell the "
    "two apart.",
    "importance": "How much of the sampled trials' ranking by text loss each setting explains. Only a bar "
    "beyond its mark says more than chance. A value that few trials had can be far worse without showing.",
    "space": "Each mark is a trial; blue is a lower text loss. Where the scale ends in an arrow, some lie "
    "beyond it.",
}
STATUS_WORDS = {
    "completed": "completed",
    "pruned": "stopped early",
    "unfinished": "running or lost",
}


def render_html(
    results: Results,
    findings: Findings,
    pictures: Mapping[str, Picture],
    best_config: str | None,
    listening: Listening | None,
) -> str:
    """The whole page as HTML."""
    workers = workers_sentence(results)
    parts = {
        "name": _e(results.sweep.name),
        "headline": _e(findings.headline),
        "lead": _lead(results, findings),
        "cards": "".join(_card(answer) for answer in findings.answers),
        "notes": _notes(findings.notes),
        "comparison": _comparison(results, findings),
        "measured": _small(measured(results.num_val_clips)),
        "listening": "" if listening is None else listening_section(listening),
        "of_search": _small(
            "These show the search, in which each configuration ran once; confirm runs are in the table "
            "below."
            if results.confirm
            else None
        ),
        "figures": "".join(_figure(key, pictures[key]) for key in CAPTIONS if key in pictures),
        "levels": _levels(results),
        "trials": _trials_table(results, findings),
        "workers": _small(workers and f"Workers: {workers}"),
        "best_config": "<p>None: no configuration could be chosen.</p>"
        if best_config is None
        else f"<pre><code>{_e(best_config)}</code></pre>",
        "environment": _environment(results),
    }
    return fill("higgs_tune.report", parts)


def _lead(results: Results, findings: Findings) -> str:
    counts = f"Trials: {trial_counts(results)}."
    if findings.choice is None:
        return f"<p>{_e(counts)}</p>"
    config = findings.choice.trial.config
    return f"<p><strong>{_e(describe(config))}</strong></p><p>{_e(counts)}</p>"


def _small(sentence: str | None) -> str:
    return "" if sentence is None else f"<p><small>{_e(sentence)}</small></p>"


def _card(answer: Answer) -> str:
    return (
        f'<section class="card {answer.tone}"><h2>{_e(answer.question)}</h2>'
        f'<p class="figure">{_e(answer.figure)}</p><p>{_e(answer.sentence)}</p></section>'
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return '<ul class="notes">' + "".join(f"<li>{_e(note)}</li>" for note in notes) + "</ul>"


def _comparison(results: Results, findings: Findings) -> str:
    rows = []
    for label, stats in comparison(results, findings.choice):
        cells = "".join(f"<td>{_stat(stat)}</td>" for stat in stats)
        rows.append(f"<tr><th scope='row'>{_e(label)}</th>{cells}</tr>")
    head = (
        "<tr><td></td><th>text loss<br><small>nats per token</small></th>"
        "<th>audio loss<br><small>nats per code</small></th>"
        "<th>audio gain<br><small>nats per token</small></th></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _stat(stat: Stat | None) -> str:
    if stat is None:
        return "–"
    return nats(stat.mean) + (f" <small>± {stat.sd:.3f}</small>" if stat.sd is not None else "")


def _figure(key: str, picture: Picture) -> str:
    wide = ' class="wide"' if key == "curves" else ""
    return f"<figure{wide}>{picture.svg}<figcaption>{_e(CAPTIONS[key])}</figcaption></figure>"


def _levels(results: Results) -> str:
    """Table of the listed settings that varied, a row per value; empty if none did."""
    rows = []
    listed = [name for name, values in results.sweep.space if isinstance(values, tuple)]
    for setting in listed:
        values = levels(results, setting)
        if len(values) < 2:
            continue
        for index, level in enumerate(values):
            name = f"<th scope='row'>{_e(setting)}</th>" if index == 0 else "<td></td>"
            rows.append(
                f"<tr>{name}<td>{_e(level.value)}</td><td>{level.num_trials}</td>"
                f"<td>{nats(level.best)}</td><td>{nats(level.median)}</td></tr>"
            )
    if not rows:
        return ""
    return (
        f"<h2>By setting</h2><p>Sampled trials, text loss at step {common_step(results)}.</p>"
        "<table><thead><tr><th>setting</th><th>value</th><th>trials</th>"
        "<th>lowest text loss</th><th>median</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


_COLUMNS = (
    "trial",
    "state",
    "step",
    "rank",
    "learning rate",
    "cross_attention",
    "targets",
    "parameters",
    "text loss",
    "audio loss",
    "audio gain",
    "audio within limit",
)


def _trials_table(results: Results, findings: Findings) -> str:
    head = "".join(f'<th><button type="button">{_e(name)}</button></th>' for name in _COLUMNS)
    body = "".join(_trial_row(results, findings, trial) for trial in results.trials)
    return f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _trial_row(results: Results, findings: Findings, trial: Trial) -> str:
    config, kind = trial.config, role(trial, findings.choice)
    tag = {
        "best": " <b>best</b>",
        "baseline": " <small>by hand</small>",
        "baseline_fixed": " <small>by hand</small>",
        "other": f" <small>confirms {_e(trial.confirms)}</small>" if trial.confirms else "",
    }[kind]
    feasible = {True: "yes", False: "no", None: "–"}[results.feasible(trial)]
    reason = f' title="{_e(trial.reason)}"' if trial.reason else ""
    text, audio, gain = (trial.last(name) for name in COMPARED)
    parameters = trial.account.get("parameters")
    each_rate = (config.learning_rate, *(change.learning_rate for change in config.schedule))
    rates = " → ".join(f"{rate:.1e}" for rate in each_rate)
    cells = [
        _cell(f"{_e(trial.id)}{tag}", trial.id),
        f"<td{reason}>{_e(STATUS_WORDS.get(trial.status, trial.status))}</td>",
        _cell(f"{trial.step} / {config.num_steps}", trial.step),
        _cell(str(config.rank), config.rank),
        _cell(rates, config.learning_rate),
        _cell(_e(config.cross_attention)),
        _cell(_e(config.target_set)),
        _number(parameters, "–" if parameters is None else f"{parameters:,}"),
        _number(text, "–" if text is None else f"{text:.3f}"),
        _number(audio, "–" if audio is None else f"{audio:.3f}"),
        _number(gain, "–" if gain is None else signed(gain, 3)),
        _cell(feasible),
    ]
    return f'<tr class="{kind}">{"".join(cells)}</tr>'


def _cell(content: str, key: Any = None) -> str:
    return f"<td>{content}</td>" if key is None else f'<td data-key="{_e(key)}">{content}</td>'


def _number(value: float | None, shown: str) -> str:
    return _cell(shown, math.inf if value is None else value)


def _environment(results: Results) -> str:
    env = dict(results.env)
    versions = env.pop("versions", {})
    if isinstance(env.get("command"), list):
        env["command"] = shlex.join(env["command"])
    rows = [*env.items(), *((f"{name} version", value) for name, value in versions.items())]
    rows.append(("data", results.sweep.data.path))
    rows.append(("base", results.sweep.base.path))
    lines = "".join(f"<tr><th scope='row'>{_e(k)}</th><td>{_e(v)}</td></tr>" for k, v in rows)
    return f"<table>{lines}</table>"
