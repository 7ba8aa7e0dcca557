"""Build evaluate.html: figures, and each clip with players and spectrograms side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.listen.systems import RECORDING, REFERENCE
from higgs_tune.report.listening import speech_table
from higgs_tune.report.template import escape, fill

_LOSSES = {
    m.VAL_TEXT_NLL: "text loss, nats per token",
    m.VAL_TEXT_NLL_SWAPPED: "text loss after another clip's audio",
    m.VAL_AUDIO_GAIN: "audio gain",
    m.VAL_AUDIO_NLL: "audio loss, nats per code",
}
_SHORT = {
    m.LENGTH_RATIO: "length ×{:.2f}",
    m.MEL_DISTANCE: "mel distance {:.1f} dB",
    m.SPEAKER_SIMILARITY: "speaker similarity {:.2f}",
    m.SPEECH_CER: "character errors heard {:.2f}",
}


def render_page(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        result: what evaluate.json holds.
        rows: what clips.jsonl holds.
    """
    names = [system["name"] for system in result["systems"]]
    num_clips = len({row["clip"] for row in rows})
    recorded = {"name": RECORDING, "speech": result["recording"]}
    notes = "".join(f"<li>{escape(note)}</li>" for note in result["notes"])
    return fill(
        "higgs_tune.listen",
        {
            "headline": escape(f"{num_clips} held-out clips, spoken by {_listed(names)}"),
            "lead": f"<p>{escape(result['data']['path'])}, base {escape(result['base']['path'])}</p>",
            "notes": f'<ul class="notes">{notes}</ul>' if notes else "",
            "losses": _losses(result["systems"]),
            "speech": speech_table([recorded, *result["systems"]]),
            "clips": "".join(_clip(number, rows) for number in _numbers(rows)),
            "settings": escape(json.dumps(result["settings"], indent=1, ensure_ascii=False)),
        },
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _losses(systems: Sequence[Mapping[str, Any]]) -> str:
    """The table of the losses, and a folded one of the codebooks."""
    codebooks = [name for name in systems[0]["losses"] if "nll_codebook" in name]
    labels = {name: f"codebook {name.rsplit('_', 1)[1]}" for name in codebooks}
    return (
        f"{_loss_table(systems, _LOSSES)}<details><summary>By codebook</summary>"
        f"{_loss_table(systems, labels)}</details>"
    )


def _loss_table(systems: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    head = "".join(f"<th>{escape(system['name'])}</th>" for system in systems)
    rows = "".join(
        f"<tr><th scope='row'>{escape(label)}<br><small>{escape(name)}</small></th>"
        + "".join(f"<td>{system['losses'][name]:.3f}</td>" for system in systems)
        + "</tr>"
        for name, label in labels.items()
    )
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Clip ids in the order of their first row."""
    return list(dict.fromkeys(row["clip"] for row in rows))


def _clip(clip: str, rows: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in rows if row["clip"] == clip]
    order = {REFERENCE: 0, RECORDING: 1}
    takes = "".join(_take(row) for row in sorted(own, key=lambda row: order.get(row["system"], 2)))
    return (
        f'<section class="clip"><p class="said" dir="auto">{escape(own[0]["text"])}</p>'
        f"<p><small>{escape(clip)} · {escape(own[0]['speaker'] or 'speaker unknown')} · "
        f"{escape(own[0]['task'])}</small></p>"
        f'<div class="takes">{takes}</div></section>'
    )


def _take(row: Mapping[str, Any]) -> str:
    title = "reference voice" if row["system"] == REFERENCE else row["system"]
    facts = [f"{row['seconds']:.2f} s"]
    if not row.get("reached_eos", True):
        facts.append("cut off at the length limit")
    facts += [
        text.format(value)
        for name, text in _SHORT.items()
        if (value := row["metrics"].get(name)) is not None
    ]
    heard = row.get("heard")
    lines = [_said("heard", heard)] if heard is not None else []
    if "transcription" in row:
        rate = row["metrics"][m.TRANSCRIPTION_CER]
        lines.append(_said(f"writes, {rate:.2f} errors per character", row["transcription"]))
    return (
        f'<div class="take"><h3>{escape(title)}</h3>'
        f'<audio controls preload="none" src="{escape(row["wav"])}"></audio>'
        f'<img src="{escape(row["picture"])}" alt="spectrogram, {escape(title)}" loading="lazy">'
        f"<p>{escape(' · '.join(facts))}</p>{''.join(lines)}</div>"
    )


def _said(label: str, text: str) -> str:
    return (
        f'<p>{escape(label)}:</p><p class="said" dir="auto">{escape(text) or "<i>nothing</i>"}</p>'
    )
