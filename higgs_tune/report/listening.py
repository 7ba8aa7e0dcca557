"""Results of `higgs-tune evaluate --results`, as the report shows them."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.errors import SweepError
from higgs_tune.report.template import escape

FOLDER, DATA, PAGE = "listen", "evaluate.json", "evaluate.html"
WEIGHTS = "adapter_model.safetensors"
SHOWN = {
    m.EOS_RATE: "ended by itself",
    m.LENGTH_RATIO: "length / recorded length",
    m.MEL_DISTANCE: "mel distance, dB",
    m.SPEAKER_SIMILARITY: "speaker similarity",
    m.SPEECH_CER: "character errors, recogniser",
    m.TRANSCRIPTION_CER: "character errors, its own transcription",
}


@dataclass(frozen=True)
class Listening:
    """Figures of generated speech, by system."""

    systems: Sequence[Mapping[str, Any]]  # "name" and "speech": metric → {"mean", "num_clips"}
    current: bool  # whether the evaluated adapter is still the sweep's best


def read_listening(results_dir: Path) -> Listening | None:
    """The evaluation in a sweep's folder; None if there is none.

    Raises:
        SweepError: its evaluate.json is damaged.
    """
    path = results_dir / FOLDER / DATA
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        systems = [{"name": s["name"], "speech": s["speech"]} for s in content["systems"]]
        fingerprints = {s["adapter_sha256"] for s in content["systems"]} - {None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SweepError(
            f"{path}: cannot be read: {error!r}. Delete {path.parent} or run "
            f"`higgs-tune evaluate --results {results_dir}` again."
        ) from None
    weights = results_dir / "best_adapter" / WEIGHTS
    best = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else None
    return Listening(systems, current=best in fingerprints)


def listening_section(listening: Listening) -> str:
    """HTML with a link to the evaluation's page, and its figures."""
    stale = (
        ""
        if listening.current
        else '<ul class="notes"><li>Another configuration has become the best since this was made: '
        "run <code>higgs-tune evaluate --results</code> again.</li></ul>"
    )
    return (
        f'<h2>Listen</h2>{stale}<p><a href="{FOLDER}/{PAGE}">Held-out clips: recorded, spoken by the '
        "base and by the best adapter</a></p>"
        f'<div class="scroll">{speech_table(listening.systems)}</div>'
    )


def speech_table(systems: Sequence[Mapping[str, Any]]) -> str:
    """HTML table of mean speech metrics: a row for each that any system has, a column per system."""
    known = {n: label for n, label in SHOWN.items() if any(n in s["speech"] for s in systems)}
    return metric_table(systems, known, lambda system, name: _mean(system["speech"].get(name)))


def metric_table(
    systems: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    cell: Callable[[Mapping[str, Any], str], str],
) -> str:
    """HTML table with a row per metric and a column per system, filled by `cell`."""
    head = "".join(f"<th>{escape(system['name'])}</th>" for system in systems)
    rows = "".join(
        f"<tr><th scope='row'>{escape(label)}<br><small>{escape(name)}</small></th>"
        + "".join(f"<td>{cell(system, name)}</td>" for system in systems)
        + "</tr>"
        for name, label in labels.items()
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _mean(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.2f} <small>{value['num_clips']} clips</small>"
