"""Human speech with transcripts: the Asterisk core sounds, from the Debian packages."""

import gzip
import re
import unicodedata
from pathlib import Path

import av
import numpy as np

from higgs_tune.embedded.make.espeak import SAMPLE_RATE_HZ, tidy

# Debian language code → (dataset name, speaker, which is the folder of the sounds)
LANGUAGES = {
    "en": ("english", "en_US_f_Allison"),
    "es": ("spanish", "es_MX_f_Allison"),
    "fr": ("french", "fr_CA_f_June"),
    "it": ("italian", "it_IT_m_Carlo"),
    "ru": ("russian", "ru_RU_f_IvrvoiceRU"),
}
MAX_S = 4.0
MIN_S = 0.4
MAX_CHARACTERS_PER_S = 30.0  # a longer text cannot be what is said
_NOISES = ("beep", "silence/", "ascending", "tt-somethingwrong")
_G722_RATE_HZ = 16_000


def transcripts(packages: Path, language: str) -> dict[str, str]:
    """Map each sound's name to its text, without noises and unusable texts."""
    name = f"asterisk-core-sounds-{language}"
    path = packages / name / "usr/share/doc" / name / f"core-sounds-{language}.txt.gz"
    found: dict[str, str] = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines():
        sound, separator, text = line.partition(":")
        text = plain(text)
        if not separator or line.startswith((";", *_NOISES)) or not text:
            continue
        found[sound.strip()] = text
    return found


def plain(text: str) -> str:
    """Lower case, no punctuation, NFC; "" if the text is unusable (brackets, digits, lost letters)."""
    if re.search(r"[\[\](){}<>\d?�]", text.rstrip(" ?")):
        return ""
    text = unicodedata.normalize("NFC", text.lower()).replace("’", "'")
    text = re.sub(r"[^\w' ]|_", " ", text)
    return re.sub(r"\s+", " ", text).strip()


def read_g722(path: Path) -> np.ndarray:
    """The 16 kHz wave of a raw G.722 file."""
    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768


def clips(packages: Path, language: str) -> list[tuple[str, str, np.ndarray]]:
    """(sound name, text, 24 kHz wave) of every usable recording, one per text."""
    speaker = LANGUAGES[language][1]
    name = f"asterisk-core-sounds-{language}-g722"
    root = packages / name / "usr/share/asterisk/sounds" / speaker
    found, seen = [], set()
    for sound, text in sorted(transcripts(packages, language).items()):
        path = root / f"{sound}.g722"
        if not path.exists() or text in seen:
            continue
        wave = tidy(read_g722(path), _G722_RATE_HZ)
        seconds = len(wave) / SAMPLE_RATE_HZ
        if MIN_S <= seconds <= MAX_S and len(text) <= MAX_CHARACTERS_PER_S * seconds:
            seen.add(text)
            found.append((sound, text, wave))
    return found
