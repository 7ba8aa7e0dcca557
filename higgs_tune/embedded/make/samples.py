"""Write recordings to listen to and to try `higgs-tune data prepare` on; measure the codec."""

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from higgs_tune.data.codec import decode_clip, encode_clip
from higgs_tune.data.mel_codec import MelRvqCodec
from higgs_tune.embedded.make.codec import log_mel_distance_db, round_trip_error_db
from higgs_tune.embedded.make.corpora import Clip
from higgs_tune.embedded.make.espeak import SAMPLE_RATE_HZ

NUM_CLIPS = {"arabic": 6, "english": 2, "spanish": 1, "french": 1, "italian": 1, "russian": 1}
NUM_DECODED = {"arabic": 2, "english": 1, "spanish": 0, "french": 1, "italian": 1, "russian": 1}
_SECONDS = (1.0, 2.0)  # length of a sample
_CODEBOOKS = (1, 2, 4, 8)


def write_samples(
    directory: Path, corpora: Mapping[str, Sequence[Clip]], codec: MelRvqCodec
) -> None:
    """Write WAVs, `manifest.csv` and `chat.jsonl` of validation clips."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("*.wav"):
        stale.unlink()
    rows = []
    for name, num_clips in NUM_CLIPS.items():
        for number, clip in enumerate(_choose(corpora[name], num_clips), start=1):
            path = f"{name}-{number}.wav"
            soundfile.write(directory / path, clip.samples, SAMPLE_RATE_HZ, subtype="PCM_16")
            rows.append((path, clip))
            if number <= NUM_DECODED[name]:
                wave = decode_clip(codec, encode_clip(codec, clip.wave, SAMPLE_RATE_HZ))
                decoded = directory / f"{name}-{number}-decoded.wav"
                soundfile.write(decoded, np.clip(wave, -1, 1), SAMPLE_RATE_HZ, subtype="PCM_16")
    with (directory / "manifest.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["id", "path", "text", "speaker", "language"])
        for path, clip in rows:
            writer.writerow([clip.id, path, clip.text, clip.speaker, clip.language])
    lines = [
        json.dumps(_chat(path, clip, i), ensure_ascii=False) for i, (path, clip) in enumerate(rows)
    ]
    (directory / "chat.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _choose(clips: Sequence[Clip], num: int) -> list[Clip]:
    """Choose validation clips of a length to listen to, speakers in turn and no text twice."""
    low, high = (int(s * SAMPLE_RATE_HZ) for s in _SECONDS)
    fit = [c for c in clips if c.split == "validation" and low <= len(c.samples) <= high]
    speakers = sorted({clip.speaker for clip in fit})
    chosen: list[Clip] = []
    for turn in range(num):
        speaker, taken = speakers[turn % len(speakers)], {clip.text for clip in chosen}
        chosen.append(next(c for c in fit if c.speaker == speaker and c.text not in taken))
    return chosen


def _chat(path: str, clip: Clip, index: int) -> dict[str, object]:
    """A conversation; every other one speaks the text, the rest transcribe the audio."""
    text = {"type": "text", "text": clip.text}
    audio = {"type": "audio", "audio_url": path}
    question, answer = (text, audio) if index % 2 == 0 else (audio, text)
    return {
        "id": f"chat-{clip.id}",
        "speaker": clip.speaker,
        "start_index": 1,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "speak or transcribe"}]},
            {"role": "user", "content": [question]},
            {"role": "assistant", "content": [answer]},
        ],
    }


def print_round_trip(corpora: Mapping[str, Sequence[Clip]], codec: MelRvqCodec) -> None:
    """Print the mean log-mel distance in dB between validation clips and what their codes decode to."""
    print(
        "| corpus | " + " | ".join(f"{n} codebooks" for n in _CODEBOOKS) + " | wave | other clip |"
    )
    for name, clips in corpora.items():
        waves = [clip.wave for clip in clips if clip.split == "validation"][:40]
        mels = [np.mean([round_trip_error_db(codec, w, n) for w in waves]) for n in _CODEBOOKS]
        decoded = [decode_clip(codec, encode_clip(codec, w, SAMPLE_RATE_HZ)) for w in waves]
        own = np.mean(
            [log_mel_distance_db(codec, *pair) for pair in zip(waves, decoded, strict=True)]
        )
        other = np.mean([log_mel_distance_db(codec, *p) for p in itertools.pairwise(waves)])
        figures = " | ".join(f"{value:.2f}" for value in (*mels, own, other))
        print(f"| {name} | {figures} |", flush=True)
