"""Let systems speak and transcribe held-out clips, and measure what they generate.

The result is audio, pictures and rows of plain data; `page` turns the rows into a page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune import metrics as m
from higgs_tune.data import tasks
from higgs_tune.data.codec import Codec
from higgs_tune.data.tokens import encode_conversation
from higgs_tune.listen.clips import Clip
from higgs_tune.listen.generate import Spoken, prompt_before_audio, speak
from higgs_tune.listen.measures import character_error_rate, mel_distance
from higgs_tune.listen.options import SpeechOptions
from higgs_tune.listen.picture import draw_spectrogram
from higgs_tune.listen.systems import RECORDING, REFERENCE, System
from higgs_tune.listen.takes import frame_limit, seconds_of, wave_of, write_wav
from higgs_tune.listen.voices import Recogniser, VoiceJudge
from higgs_tune.model.load import Base
from higgs_tune.model.writing import GeneratedText, prompt_before_text, write_text
from higgs_tune.report.listening import SHOWN
from higgs_tune.train.checkpoint import adapted

AUDIO_FOLDER = "audio"


@dataclass(frozen=True, eq=False)
class Judges:
    """The codec that decodes speech, and the models that judge it; None leaves a judge's metric out."""

    codec: Codec
    voice: VoiceJudge | None
    recogniser: Recogniser | None

    @property
    def rate_hz(self) -> int:
        """Sample rate of every decoded wave."""
        return self.codec.config.sample_rate


@dataclass(frozen=True, eq=False)
class Bench:
    """The clips, their decoded recordings and references, the judges and the output folder.

    Recordings pass through the codec too, so that a difference comes from the model, not the codec.
    """

    clips: Sequence[Clip]
    recordings: Sequence[np.ndarray]
    references: Sequence[np.ndarray | None]
    judges: Judges
    out: Path

    @classmethod
    def of(cls, clips: Sequence[Clip], judges: Judges, out: Path) -> "Bench":
        """Decode the clips' recordings and references."""
        return cls(
            clips,
            [wave_of(clip.row.codes[0], judges.codec) for clip in clips],
            [
                None if clip.reference is None else wave_of(clip.reference.codes[0], judges.codec)
                for clip in clips
            ],
            judges,
            out,
        )

    def record(self, number: int, system: str, wave: np.ndarray, **facts: Any) -> dict[str, Any]:
        """Write a clip's WAV and spectrogram, and return its row of clips.jsonl."""
        clip = self.clips[number]
        stem = f"{AUDIO_FOLDER}/{number + 1:02d}-{system}"
        write_wav(self.out / f"{stem}.wav", wave, self.judges.rate_hz)
        longest = len(self.recordings[number]) / self.judges.rate_hz
        draw_spectrogram(self.out / f"{stem}.png", wave, self.judges.rate_hz, longest)
        return {
            "clip": clip.row.id,
            "system": system,
            "task": clip.spoken.task,
            "speaker": clip.row.speaker,
            "reference": None if clip.reference is None else clip.reference.id,
            "text": clip.row.text,
            "wav": f"{stem}.wav",
            "picture": f"{stem}.png",
            "seconds": len(wave) / self.judges.rate_hz,
            **facts,
        }

    def judge(self, number: int, wave: np.ndarray) -> tuple[dict[str, float | None], str | None]:
        """Metrics of a wave from the voice judge and the recogniser, and the recogniser's transcript."""
        judges, reference = self.judges, self.references[number]
        found: dict[str, float | None] = {}
        heard = None
        if judges.voice is not None and reference is not None:
            found[m.SPEAKER_SIMILARITY] = judges.voice.similarity(wave, reference, judges.rate_hz)
        if judges.recogniser is not None:
            heard = judges.recogniser.text_of(wave, judges.rate_hz)
            text = self.clips[number].row.text
            found[m.SPEECH_CER] = judges.recogniser.error_rate(heard, text)
        return found, heard


def recording_rows(bench: Bench) -> list[dict[str, Any]]:
    """Rows of the recordings, judged like generated speech, and of the references, not judged."""
    rows = []
    for number, wave in enumerate(bench.recordings):
        found, heard = bench.judge(number, wave)
        rows.append(bench.record(number, RECORDING, wave, metrics=found, heard=heard))
        reference = bench.references[number]
        if reference is not None:
            rows.append(bench.record(number, REFERENCE, reference, metrics={}))
    return rows


def system_rows(
    base: Base, system: System, bench: Bench, speech: SpeechOptions, batch_clips: int
) -> list[dict[str, Any]]:
    """Rows with one system's speech and transcripts, and their metrics."""
    with adapted(base.model, system.adapter) as model:
        said = list(_speech(base, model, bench, speech, batch_clips))
        written = [_transcription(base, model, clip) for clip in bench.clips]
    rows = []
    for number, (spoken, text) in enumerate(zip(said, written, strict=True)):
        clip, recording = bench.clips[number], bench.recordings[number]
        wave = wave_of(spoken.codes_TC, bench.judges.codec)
        found, heard = bench.judge(number, wave)
        transcription = str(base.tokenizer.decode(list(text.ids)))
        recorded_s = seconds_of(clip.row.codes[0], bench.judges.codec)
        found |= {
            m.EOS_RATE: float(spoken.reached_eos),
            m.LENGTH_RATIO: seconds_of(spoken.codes_TC, bench.judges.codec) / recorded_s,
            m.MEL_DISTANCE: mel_distance(wave, recording, bench.judges.rate_hz),
            m.TRANSCRIPTION_CER: character_error_rate(transcription, clip.row.text),
        }
        rows.append(
            bench.record(
                number,
                system.name,
                wave,
                reached_eos=spoken.reached_eos,
                num_clipped_codes=spoken.num_clipped,
                metrics=found,
                heard=heard,
                transcription=transcription,
                transcription_ended=text.reached_end,
            )
        )
    return rows


def _speech(
    base: Base,
    model: HiggsAudioV2ForConditionalGeneration,
    bench: Bench,
    speech: SpeechOptions,
    batch_clips: int,
) -> Iterator[Spoken]:
    """Speak the clips in order, batch by batch."""
    prompts = [
        prompt_before_audio(encode_conversation(clip.spoken, base.vocabulary))
        for clip in bench.clips
    ]
    for start in range(0, len(prompts), batch_clips):
        part = prompts[start : start + batch_clips]
        limit = frame_limit(model, part, bench.judges.codec, speech.max_seconds)
        yield from speak(
            model, base.vocabulary, part, speech, seed=speech.seed + start, max_frames=limit
        )


def _transcription(
    base: Base, model: HiggsAudioV2ForConditionalGeneration, clip: Clip
) -> GeneratedText:
    """The model's transcript of the recording, of at most 2n + 8 tokens where the true text has n."""
    talk = tasks.transcribe(clip.row)
    prompt = prompt_before_text(encode_conversation(talk, base.vocabulary))
    room = model.config.max_position_embeddings - len(prompt.ids_L)
    num_tokens = len(base.vocabulary.encode_text(clip.row.text))
    return write_text(model, base.vocabulary, prompt, min(2 * num_tokens + 8, room))


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Mean of each metric over the clips that have it, and the number of those clips."""
    result: dict[str, dict[str, float | int]] = {}
    for name in SHOWN:
        values = [v for row in rows if (v := row["metrics"].get(name)) is not None]
        if values:
            result[name] = {"mean": sum(values) / len(values), "num_clips": len(values)}
    return result
