"""Spectrogram pictures."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from higgs_tune.files import write_bytes, writing
from higgs_tune.listen.measures import log_mel
from higgs_tune.listen.options import WRITE_ADVICE
from higgs_tune.report.ink import STYLE, png_of

_LOUDEST, _SOFTEST = 4.5, -2.5  # log mel magnitudes at the ends of the colour scale
_TICKS_HZ = (200, 500, 1000, 2000, 4000, 8000)


def mel_of_hz(hz: float) -> float:
    """A frequency on the mel scale (HTK), which spaces `log_mel`'s bands."""
    return 2595.0 * float(np.log10(1.0 + hz / 700.0))


def draw_spectrogram(path: Path, wave: np.ndarray, rate_hz: int, least_seconds: float) -> None:
    """Write a log-mel spectrogram; a time axis of at least `least_seconds` makes clips comparable."""
    seconds = len(wave) / rate_hz
    top_hz = min(11_000.0, rate_hz / 2)
    low, high = mel_of_hz(40.0), mel_of_hz(top_hz)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 1.9), layout="constrained", dpi=110)
        axes = figure.subplots()
        if len(wave):
            axes.imshow(
                log_mel(wave, rate_hz).numpy().T,
                origin="lower",
                aspect="auto",
                interpolation="nearest",
                cmap="magma",
                vmin=_SOFTEST,
                vmax=_LOUDEST,
                extent=(0.0, seconds, low, high),
            )
        axes.set_xlim(0, max(seconds, least_seconds))
        axes.set_ylim(low, high)
        ticks = [hz for hz in _TICKS_HZ if hz < top_hz]
        axes.set_yticks([mel_of_hz(hz) for hz in ticks])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda _, place: _hz(ticks[place or 0])))
        axes.grid(visible=False)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("s", fontsize=7, labelpad=1)
        axes.set_ylabel("Hz", fontsize=7, labelpad=1)
        with writing(path, WRITE_ADVICE):
            write_bytes(path, png_of(figure))


def _hz(value: int) -> str:
    return f"{value // 1000}k" if value >= 1000 else str(value)
