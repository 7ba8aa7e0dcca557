"""Build evaluate.html: figures, and each clip with players and spectrograms side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from higgs_tune import metrics as m
from higgs_tune.listen.systems import RECORDING, REFERENCE
from higgs_tune.report.listening import metric_table, speech_table
from higgs_tune.report.template import escape, fill

LOSSES = {
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
    """The whole page as HTML.

    Args:
        result: content of evaluate.json.
        rows: content of clips.jsonl.
    """
    names = [system["name"] for system in result["systems"]]
    clips = list(dict.fromkeys(row["clip"] for row in rows))
    recorded = {"name": RECORDING, "speech": result["recording"]}
    notes = "".join(f"<li>{escape(note)}</li>" for note in result["notes"])
    return fill(
        "higgs_tune.listen",
        {
            "headline": escape(f"{len(clips)} held-out clips, spoken by {_listed(names)}"),
            "lead": f"<p>{escape(result['data']['path'])}, base {escape(result['base']['path'])}</p>",
            "notes": f'<ul class="notes">{notes}</ul>' if notes else "",
            "num_clips": escape(result["data"]["num_clips"]),
            "losses": _losses(result["systems"]),
            "speech": speech_table([recorded, *result["systems"]]),
            "clips": "".join(_clip(clip, rows) for clip in clips),
            "settings": escape(json.dumps(result["settings"], indent=1, ensure_ascii=False)),
        },
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _losses(systems: Sequence[Mapping[str, Any]]) -> str:
    """Table of the losses, and a collapsed one of the audio loss by codebook."""
    codebooks = [name for name in systems[0]["losses"] if "nll_codebook" in name]
    labels = {name: f"codebook {name.rsplit('_', 1)[1]}" for name in codebooks}
    return (
        f"{metric_table(systems, LOSSES, _loss)}<details><summary>By codebook</summary>"
        f"{metric_table(systems, labels, _loss)}</details>"
    )


def _loss(system: Mapping[str, Any], name: str) -> str:
    return f"{system['losses'][name]:.3f}"


def _clip(clip: str, rows: Sequence[Mapping[str, Any]]) -> str:
    own = [row for row in rows if row["clip"] == clip]
    order = {REFERENCE: 0, RECORDING: 1}
    takes = "".join(_take(row) for row in sorted(own, key=lambda row: order.get(row["system"], 2)))
    return (
        f'<section class="clip"><p class="said" dir="auto">{escape(own[0]["text"])}</p>'
        f"<p><small><bdi>{escape(clip)}</bdi> · "
        f"<bdi>{escape(own[0]['speaker'] or 'speaker unknown')}</bdi> · "
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
    lines = [_said("recogniser heard", heard)] if heard is not None else []
    if "transcription" in row:
        rate = row["metrics"][m.TRANSCRIPTION_CER]
        lines.append(_said(f"wrote, {rate:.2f} errors per character", row["transcription"]))
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
