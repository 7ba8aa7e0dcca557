"""The sweep's findings as one terminal screen (summary.txt) and as data (summary.json)."""

import json
import shlex
import shutil
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_tune.files import write_text
from higgs_tune.report.choose import Stat
from higgs_tune.report.findings import COMPARED, Findings, comparison, trial_counts
from higgs_tune.report.results import Results
from higgs_tune.report.wording import describe, measured, nats
from higgs_tune.report.workers import workers_sentence

WIDTH = 96  # columns of summary.txt, and at most of a terminal's summary
_LABELS = {
    "found": "Result",
    "text": "Text",
    "audio": "Audio",
    "listening": "Listening",
    "mattered": "Mattered",
}


@dataclass(frozen=True)
class Summary:
    """What `build_report` found and wrote."""

    best_id: str | None  # the search trial with the best configuration; None if none was chosen
    text: str  # one screen, as wide as the terminal
    facts: dict[str, Any]  # summary.json
    report_path: Path


def summary_facts(results: Results, findings: Findings) -> dict[str, Any]:
    """The findings as plain data, for summary.json."""
    choice = findings.choice
    best = None
    if choice is not None:
        best = {
            "trial_id": choice.trial.id,
            "name": choice.trial.name,
            "config": choice.trial.config.model_dump(mode="json"),
            "runs": [run.id for run in choice.runs],
            "val": {
                name: stat.as_dict() for name in COMPARED if (stat := choice.stat(name)) is not None
            },
            "paired_difference_to_baseline": choice.difference and choice.difference.as_dict(),
            "difference_95_percent_interval": choice.difference and choice.difference.interval,
            "confirm": choice.confirm,
        }
    importance = findings.importance
    return {
        "name": results.sweep.name,
        "outcome": findings.outcome,
        "headline": findings.headline,
        "answers": {
            answer.key: {"figure": answer.figure, "sentence": answer.sentence}
            for answer in findings.answers
        },
        "notes": list(findings.notes),
        "base": results.base,
        "num_val_clips": results.num_val_clips,
        "audio_limit": results.audio_limit,
        "best": best,
        "importance": importance
        and {
            "shares": importance.shares,
            "by_chance": importance.by_chance,
            "mattered": importance.mattered,
            "step": importance.step,
            "num_trials": importance.num_trials,
        },
        "num_trials": dict(sorted(Counter(trial.status for trial in results.search).items())),
        "num_confirm_runs": len(results.confirm),
        "workers": results.workers,
    }


def summary_text(results: Results, findings: Findings, width: int = WIDTH) -> str:
    """The findings as one screen of plain text, wrapped to `width`."""
    fields: list[tuple[str, str]] = []
    if findings.choice is not None:
        trial = findings.choice.trial
        fields.append(("Best", f"{trial.id}: {describe(trial.config)}"))
    for answer in findings.answers:
        text = answer.sentence
        if answer.key != "found":
            unit = {"text": " nats per token", "audio": " nats per code"}.get(answer.key, "")
            text = f"{answer.figure}{unit}. {text}"
        fields.append((_LABELS[answer.key], text))
    if (basis := measured(results.num_val_clips)) is not None:
        fields.append(("Measured", basis))
    fields.append(("Trials", trial_counts(results) + "."))
    if (workers := workers_sentence(results)) is not None:
        fields.append(("Workers", workers))
    fields += [("Note", note) for note in findings.notes]
    lines = [f"Sweep {results.sweep.name}: {findings.headline}", ""]
    for label, text in fields:
        lines += textwrap.wrap(
            text, width, initial_indent=f"  {label:<11}", subsequent_indent=" " * 13
        )
    rows = comparison(results, findings.choice)
    if len(rows) > 1:
        lines += ["", *_comparison_lines(rows)]
    lines += ["", *_next_steps(results, findings)]
    return "\n".join(lines) + "\n"


def terminal_width() -> int:
    """Columns for a summary on this terminal, from 40 to `WIDTH`."""
    return max(40, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def _comparison_lines(rows: list[tuple[str, list[Stat | None]]]) -> list[str]:
    table = [["", "text nll", "audio nll", "audio gain"]]
    table += [
        [label, *("–" if s is None else nats(s.mean) for s in stats)] for label, stats in rows
    ]
    first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
    return [
        "  ".join(["", f"{label:<{first}}", *map(str.rjust, figures, widths)])
        for label, *figures in table
    ]


def _next_steps(results: Results, findings: Findings) -> list[str]:
    here = Path.cwd()
    shown = results.directory.absolute()
    if shown.is_relative_to(here):
        shown = shown.relative_to(here)
    steps = [f"  Report         {shown / 'report.html'}"]
    if findings.choice is not None:
        command = [_program(here), "train", "--config", str(shown / "best_config.yaml")]
        steps.append(f"  Train it again {shlex.join(command)}")
    return steps


def _program(here: Path) -> str:
    """How to call this Python's higgs-tune from the folder `here`; it need not be on the PATH."""
    beside = Path(sys.executable).with_name("higgs-tune")
    if not beside.exists() or shutil.which("higgs-tune") == str(beside):
        return "higgs-tune"
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def write_summary(results: Results, findings: Findings, facts: dict[str, Any]) -> None:
    """Write summary.json and summary.txt into the results folder."""
    content = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(results.directory / "summary.json", content + "\n")
    write_text(results.directory / "summary.txt", summary_text(results, findings))
