"""Models that judge speech: Resemblyzer for the voice, any transformers recogniser for the words.

Both are optional: without a model, its metric is left out.
"""

import importlib
from typing import Any

import numpy as np
import torch
import torchaudio
from transformers import pipeline

from higgs_tune.data.plain_text import plain_text
from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.listen.measures import character_error_rate

_RATE_HZ = 16_000  # Resemblyzer's
_SILENCE = 1e-4  # peak, where full scale is 1


class VoiceJudge:
    """Speaker similarity with Resemblyzer, whose weights ship with its package.

    Raises:
        ConfigError: Resemblyzer is not installed, or one of its libraries cannot be imported.
    """

    def __init__(self, device: torch.device):
        try:
            self._library: Any = importlib.import_module("resemblyzer")
        except ImportError as error:
            raise ConfigError(
                f"speaker similarity needs Resemblyzer, which cannot be imported ({error}). Install "
                'the extra: pip install "higgs-tune[listen]".'
            ) from None
        self._encoder = self._library.VoiceEncoder(str(device), verbose=False)

    def similarity(self, wave: np.ndarray, reference: np.ndarray, rate_hz: int) -> float | None:
        """Cosine of two clips' voice embeddings, 1 for the same; None if either has no voiced sound."""
        first, second = self._embedding(wave, rate_hz), self._embedding(reference, rate_hz)
        return None if first is None or second is None else float(first @ second)

    def _embedding(self, wave: np.ndarray, rate_hz: int) -> np.ndarray | None:
        """Unit vector of the voiced parts; None if there are none."""
        if not len(wave) or float(np.abs(wave).max()) < _SILENCE:
            return None
        voiced = self._library.preprocess_wav(resample(wave, rate_hz, _RATE_HZ))
        return self._encoder.embed_utterance(voiced) if len(voiced) else None


class Recogniser:
    """Any transformers speech recognition checkpoint.

    Raises:
        ModelError: it cannot be loaded.
        ConfigError: it does not know the language, or takes none because it knows only one.
    """

    def __init__(self, path: str, device: torch.device, revision: str | None, language: str | None):
        try:
            # Any: the type of the task's name differs between versions of transformers
            make: Any = pipeline
            self._pipeline: Any = make(
                "automatic-speech-recognition", model=path, revision=revision, device=device
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"--asr {path}: not a speech recognition checkpoint that transformers can load: "
                f"{error}"
            ) from error
        extractor = self._pipeline.feature_extractor
        self._rate_hz: int = extractor.sampling_rate
        is_whisper = self._pipeline.type == "seq2seq_whisper"
        self._max_samples: float = extractor.n_samples if is_whisper else float("inf")
        self._arguments = {"generate_kwargs": {"language": language}} if language else {}
        if language:
            try:  # a recogniser refuses a language only when it transcribes
                self.text_of(np.zeros(self._rate_hz, np.float32), self._rate_hz)
            except ValueError as error:
                raise ConfigError(
                    f"--asr-language {language}: {path} does not accept it: {error}"
                ) from error

    def text_of(self, wave: np.ndarray, rate_hz: int) -> str:
        """Transcript of a clip; empty for one without samples."""
        if not len(wave):
            return ""
        heard = resample(wave, rate_hz, self._rate_hz)
        arguments: dict[str, Any] = dict(self._arguments)
        if len(heard) > self._max_samples:  # Whisper continues after 30 s only with timestamps
            arguments["return_timestamps"] = True
        result = self._pipeline({"raw": heard, "sampling_rate": self._rate_hz}, **arguments)
        return result["text"]

    def error_rate(self, heard: str, target: str) -> float | None:
        """Character error rate of a transcript; None if `plain_text` leaves nothing of the target.

        Case, punctuation, vowel signs and the script of digits are ignored: recognisers choose them
        freely, so they are not errors of speech.
        """
        plain = plain_text(target)
        return character_error_rate(plain_text(heard), plain) if plain else None


def resample(wave: np.ndarray, rate_hz: int, target_hz: int) -> np.ndarray:
    """The wave resampled from `rate_hz` to `target_hz`."""
    resampled = torchaudio.functional.resample(torch.from_numpy(wave), rate_hz, target_hz)
    return resampled.numpy()
