"""Synthesise speech with espeak-ng, through the shared library in the package `espeakng-loader`."""

import ctypes
import functools
from dataclasses import dataclass

import espeakng_loader
import numpy as np
import torch
import torchaudio

SAMPLE_RATE_HZ = 24_000
RMS = 0.06  # level of every clip, about -24 dBFS
SILENCE_DB = -45.0  # relative to the loudest 10 ms; what is quieter is trimmed from both ends
_SYNCHRONOUS, _UTF8 = 2, 1  # espeak_AUDIO_OUTPUT and espeakCHARS of speak_lib.h
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER of speak_lib.h


@dataclass(frozen=True)
class Voice:
    """One speaker: an espeak-ng variant at a fixed pitch, pitch range and rate."""

    variant: str
    pitch: int = 50
    rate: int = 200
    range: int = 50

    @property
    def name(self) -> str:
        return f"espeak-{self.variant.replace(' ', '')}-p{self.pitch}-r{self.rate}"


class Espeak:
    """A running espeak-ng.

    The noise in a clip depends on what was spoken before it; the same calls in the same order give the
    same clips in every process.
    """

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._native_rate = library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0
        )
        if self._native_rate <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {self._native_rate}")
        callback_type = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the default seed is the clock
        self._callback = callback_type(self._collect)  # kept alive: C holds no reference
        library.espeak_SetSynthCallback(self._callback)
        self._library = library

    def _collect(self, samples, num_samples: int, _events) -> int:
        if samples and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def speak(self, text: str, language: str, voice: Voice) -> np.ndarray:
        """Return a trimmed float32 clip at 24 kHz and a fixed level."""
        library = self._library
        name = f"{language}+{voice.variant}".encode()
        if library.espeak_SetVoiceByName(name) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")
        for parameter, value in (
            (_RATE, voice.rate),
            (_PITCH, voice.pitch),
            (_RANGE, voice.range),
        ):
            library.espeak_SetParameter(parameter, value, 0)
        self._chunks.clear()
        raw = text.encode()
        status = library.espeak_Synth(raw, len(raw) + 1, 0, 1, 0, _UTF8, None, None)
        if status != 0 or not self._chunks:
            raise RuntimeError(f"espeak-ng said nothing for {text!r} (status {status})")
        wave = np.concatenate(self._chunks).astype(np.float32) / 32768
        return tidy(wave, self._native_rate)


@functools.cache
def _resampler(rate_hz: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate_hz, SAMPLE_RATE_HZ)


def tidy(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to 24 kHz, trim silence from both ends, set the level."""
    wave = _resampler(rate_hz)(torch.from_numpy(wave)).numpy()
    window = SAMPLE_RATE_HZ // 100
    energy = np.square(wave[: len(wave) // window * window]).reshape(-1, window).mean(1)
    loud = np.flatnonzero(energy > energy.max() * 10 ** (SILENCE_DB / 10))
    if not len(loud) or energy.max() <= 0:
        raise ValueError("the clip is silent")
    margin = 2  # windows kept on each side
    start, end = max(loud[0] - margin, 0), min(loud[-1] + 1 + margin, len(energy))
    wave = wave[start * window : end * window]
    wave = wave * (RMS / np.sqrt(np.square(wave).mean()))
    return np.clip(wave, -1, 1).astype(np.float32)
