"""The corpora as clips: what is said, by whom, in which split."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from higgs_tune.embedded.make import arabic, human, phrases, voices
from higgs_tune.embedded.make.espeak import SAMPLE_RATE_HZ, Espeak, Voice

NUM_ARABIC_SENTENCES = 720
ARABIC_VALIDATION_SHARE = 1 / 6
ARABIC_VOICES_PER_SENTENCE = {"train": 4, "validation": 2}
NUM_PRETRAIN_TEXTS = {"train": 1300, "validation": 40}  # of each language
MADE_UP_SHARE = 0.5
PRETRAIN_MAX_S = 3.2
HUMAN_VALIDATION_SHARE = 0.15
SPLIT_RULES = {
    "arabic": "by sentence and by voice: the splits share neither",
    "human": "by text: the splits share none; each language has one speaker",
    "pretrain": "by text and by voice: the splits share neither",
}


@dataclass(frozen=True, eq=False)
class Clip:
    """One recording at 24 kHz, as int16 so that a whole corpus fits in memory."""

    id: str
    split: str
    speaker: str
    language: str
    text: str
    samples: np.ndarray

    @property
    def wave(self) -> np.ndarray:
        """float32 in [-1, 1]."""
        return self.samples.astype(np.float32) / 32768  # as soundfile reads it


def _int16(wave: np.ndarray) -> np.ndarray:
    return np.clip(np.round(wave * 32768), -32768, 32767).astype(np.int16)


def arabic_clips(espeak: Espeak) -> list[Clip]:
    """Arabic sentences in several voices; validation has its own sentences and voices."""
    sentences = arabic.sentences(NUM_ARABIC_SENTENCES, seed=0)
    num_validation = round(len(sentences) * ARABIC_VALIDATION_SHARE)
    rng = random.Random(0)
    rng.shuffle(sentences)
    parts = {
        "train": (sentences[num_validation:], voices.ARABIC_TRAIN),
        "validation": (sentences[:num_validation], voices.ARABIC_VALIDATION),
    }
    plan = [
        (split, number, text, voice)
        for split, (texts, speakers) in parts.items()
        for number, text in enumerate(texts)
        for voice in rng.sample(speakers, ARABIC_VOICES_PER_SENTENCE[split])
    ]
    return [
        Clip(
            id=f"ar-{split}-{number:04d}-{voice.variant}",
            split=split,
            speaker=voice.name,
            language="ar",
            text=text,
            samples=_int16(espeak.speak(text, "ar", voice)),
        )
        for split, number, text, voice in track(plan, "arabic")
    ]


def human_clips(packages: Path, language: str) -> list[Clip]:
    """One language of the Asterisk core sounds; validation has its own texts."""
    found = human.clips(packages, language)
    order = list(range(len(found)))
    random.Random(f"human-{language}").shuffle(order)
    validation = set(order[: round(len(found) * HUMAN_VALIDATION_SHARE)])
    return [
        Clip(
            id=f"{language}-{sound.replace('/', '-')}",
            split="validation" if index in validation else "train",
            speaker=human.LANGUAGES[language][1],
            language=language,
            text=text,
            samples=_int16(wave),
        )
        for index, (sound, text, wave) in enumerate(found)
    ]


def pretraining_clips(espeak: Espeak, taken_texts: set[str]) -> list[Clip]:
    """Seven languages in other voices, without the texts of `taken_texts`."""
    train_voices, validation_voices = voices.pretraining_voices()
    clips: list[Clip] = []
    for language in phrases.LANGUAGES:
        texts = phrases.phrases(language, sum(NUM_PRETRAIN_TEXTS.values()), MADE_UP_SHARE, seed=0)
        kept = [text for text in texts if text not in taken_texts]
        num_validation = NUM_PRETRAIN_TEXTS["validation"]
        parts: dict[str, tuple[Sequence[str], Sequence[Voice]]] = {
            "train": (kept[num_validation:], train_voices),
            "validation": (kept[:num_validation], validation_voices),
        }
        for split, (part_texts, speakers) in parts.items():
            clips.extend(_spoken(espeak, language, split, part_texts, speakers))
    return clips


def _spoken(
    espeak: Espeak, language: str, split: str, texts: Sequence[str], speakers: Sequence[Voice]
) -> Iterator[Clip]:
    rng = random.Random(f"pretrain-{language}-{split}")
    for number, text in enumerate(track(texts, f"pretrain {language} {split}")):
        voice = rng.choice(speakers)
        wave = espeak.speak(text, language, voice)
        if len(wave) <= PRETRAIN_MAX_S * SAMPLE_RATE_HZ:
            clip_id = f"{language}-{split}-{number:05d}"
            yield Clip(clip_id, split, voice.name, language, text, _int16(wave))
