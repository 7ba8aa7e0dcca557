"""Distances of generated speech and text from the recording and the true text.

Shape letters: N samples, F frames, K cepstral coefficients, A and B frames of two clips.
"""

import math
import unicodedata
from functools import cache

import numpy as np
import torch
import torchaudio
from torch import Tensor

_HOP_S = 0.01
_FFT_S = 0.04
_NUM_MELS = 80
_NUM_CEPSTRA = 13  # the usual choice; the 0th, loudness, is left out
_FLOOR = 1e-2  # smaller mel magnitudes count as silence, as in the embedded codec
_DB = 20 / math.log(10)  # dB per nat of amplitude


@cache
def _mel(rate_hz: int) -> torchaudio.transforms.MelSpectrogram:
    return torchaudio.transforms.MelSpectrogram(
        rate_hz,
        n_fft=2 ** math.ceil(math.log2(_FFT_S * rate_hz)),
        win_length=round(_FFT_S * rate_hz),
        hop_length=round(_HOP_S * rate_hz),
        f_min=40.0,
        f_max=min(11_000.0, rate_hz / 2),
        n_mels=_NUM_MELS,
        power=1.0,
    )


def log_mel(wave_N: np.ndarray, rate_hz: int) -> Tensor:
    """Log mel magnitudes (F, mels), one frame per 10 ms."""
    magnitudes = _mel(rate_hz)(torch.from_numpy(np.ascontiguousarray(wave_N, dtype=np.float32)))
    return magnitudes.clamp_min(_FLOOR).log().T


def cepstra(wave_N: np.ndarray, rate_hz: int) -> np.ndarray:
    """Mel cepstra 1 to 13 in dB, (F, K).

    The Euclidean distance of two rows is the root mean square difference, over the mel bands, of two
    smoothed spectra without their loudness.
    """
    basis = torchaudio.functional.create_dct(_NUM_CEPSTRA + 1, _NUM_MELS, norm="ortho")[:, 1:]
    return (_DB / math.sqrt(_NUM_MELS) * log_mel(wave_N, rate_hz) @ basis).numpy()


def mel_distance(wave: np.ndarray, reference: np.ndarray, rate_hz: int) -> float | None:
    """Mel cepstral distortion in dB along the best alignment; None if a clip has no samples.

    Mean over the steps of the dynamic time warping path. It has the form of Kubichek's MCD (1993), but
    on cepstra of a mel filter bank, so compare it only with figures of this package.
    """
    if not len(wave) or not len(reference):
        return None
    a, b = cepstra(wave, rate_hz), cepstra(reference, rate_hz)
    # The faster way by matrix products loses digits where two frames are alike.
    cost_AB = torch.cdist(
        torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist"
    )
    total, num_steps = dynamic_time_warping(cost_AB.numpy())
    return total / num_steps


def dynamic_time_warping(cost_AB: np.ndarray) -> tuple[float, int]:
    """Dynamic time warping: the lowest sum of costs from corner to corner, and its number of steps.

    A step advances one row, one column or both; all weigh the same. Computed along anti-diagonals,
    whose cells do not depend on one another.
    """
    num_a, num_b = cost_AB.shape
    total = np.full((num_a + 1, num_b + 1), np.inf)
    steps = np.zeros((num_a + 1, num_b + 1), dtype=np.int64)
    total[0, 0] = 0.0
    for diagonal in range(2, num_a + num_b + 1):
        i = np.arange(max(1, diagonal - num_b), min(num_a, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        counts = np.stack([steps[i - 1, j - 1], steps[i - 1, j], steps[i, j - 1]])
        best = before.argmin(axis=0)[None]
        total[i, j] = cost_AB[i - 1, j - 1] + np.take_along_axis(before, best, axis=0)[0]
        steps[i, j] = 1 + np.take_along_axis(counts, best, axis=0)[0]
    return float(total[-1, -1]), int(steps[-1, -1])


def character_error_rate(text: str, target: str) -> float:
    """Edits (insert, delete, replace) per character of a non-empty target; may exceed 1.

    Both texts are compared in NFC: a tokenizer may reorder a vowel sign and a shadda, which is not an error.
    """
    text, target = (unicodedata.normalize("NFC", one) for one in (text, target))
    return torchaudio.functional.edit_distance(text, target) / len(target)
