"""Recordings as mono waves, or the reason why one cannot be used."""

import math
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import soundfile

from higgs_tune.data.mp3 import mp3_seconds
from higgs_tune.errors import DataError

_SHOWN_CHARS = 120
_SILENCE = 1e-4  # peak of full scale 1: -80 dB
_MAX_PEAK = 16.0  # float files above it were never scaled to ±1
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 400_000  # others are a header's mistake
# torchaudio's resampling kernel has about this many numbers per pair of rates without common factor.
_MAX_KERNEL = 50_000_000
# What libsndfile notes about a chunk of samples that ends before its header says.
_CUT_CHUNK = re.compile(r"^\s*(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAM_BYTES = 0x7FFF0000  # sizes from here on are written before a recording's length is known
_UNKNOWN_FRAMES = 2**62  # of a FLAC that was written to a pipe
_MAX_MISSING_S = 0.1  # less is no word; some encoders count a frame too many
_MAX_MP3_MISSING_S = 0.3  # the decoder's delay and the encoder's padding are frames, too
_UNOPENED = "audio cannot be opened"
_ABSENT = "does not exist"
_USE_OTHER = "convert it to WAV or FLAC, for example with ffmpeg"


def locate(root: Path, name: str) -> Path:
    """The file that a manifest names, symlinks followed.

    Args:
        root: the data root, itself resolved.

    Raises:
        DataError: outside `root`, not there, or not a file.
    """
    shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}…"
    try:
        path = as_stored(root, name).resolve()
        if not path.is_relative_to(root):
            raise DataError(
                f"audio {shown!r} is outside the data root {root}: move it inside or set --data-root"
            )
        if not path.is_file():
            state = "is not a file" if path.exists() else _ABSENT
            raise DataError(
                f"audio {shown!r} {state} (looked in {root}): mend the path or set --data-root"
            )
    except (OSError, ValueError, RuntimeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise DataError(f"audio {shown!r} is not a usable path ({detail})") from None
    return path


def as_stored(root: Path, name: str) -> Path:
    """The path of a name, in another spelling if only that is there.

    macOS takes letters with marks apart; Windows writes `\\` for `/`.
    """
    path = root / name
    if (name.isascii() and "\\" not in name) or path.exists():
        return path
    slashes = name.replace("\\", "/")
    others = (root / unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
    return next((other for other in others if other.exists()), path)


def is_passing(reason: str) -> bool:
    """Whether a rejection is the file system's: another time, or on another machine, it may not hold."""
    return _UNOPENED in reason or _ABSENT in reason


def can_be_opened(root: Path, name: str) -> bool:
    """Whether a manifest's file is there and may be read, here and now."""
    try:
        return os.access(locate(root, name), os.R_OK)
    except DataError:
        return False


def read_clip(
    path: Path, *, min_seconds: float, max_seconds: float, target_rate_hz: int
) -> tuple[np.ndarray, int]:
    """A recording of any rate and channel count as (float32 mono wave, its rate in Hz).

    Channels are averaged. The length is checked before samples are read.

    Raises:
        DataError: cannot be opened, not audio, cut off, an MP3 whose header states less than it holds,
            too short or long, silent, not finite, or at a rate that is none or cannot be resampled
            to `target_rate_hz`.
    """
    if path.suffix.lower() == ".raw":  # soundfile would ask for a rate, whatever is in it
        raise DataError(f"audio cannot be read: a .raw file has no header: {_USE_OTHER}")
    try:
        path.open("rb").close()  # libsndfile does not say why it cannot
    except OSError as error:
        raise DataError(f"{_UNOPENED}: {error.strerror}") from None
    try:
        with soundfile.SoundFile(path) as file:
            rate_hz = file.samplerate
            if not _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ:
                raise DataError(
                    f"audio's header states a sample rate of {rate_hz} Hz, needed {_MIN_RATE_HZ} to "
                    f"{_MAX_RATE_HZ} Hz: write it anew with its true rate"
                )
            stated_s = _stated_frames(file) / rate_hz
            if file.frames >= _UNKNOWN_FRAMES:
                raise DataError(f"audio's header states no length: {_USE_OTHER}")
            _check_length(file.frames / rate_hz, min_seconds, max_seconds)
            # with their number, without which it must be able to seek
            samples = file.read(file.frames, dtype="float32", always_2d=True)
            wave = samples.mean(axis=1)
            is_mp3 = file.format == "MP3"
    except (soundfile.LibsndfileError, OSError) as error:
        detail = str(error).split(": ", 1)[-1] if path.stat().st_size else "the file is empty"
        if "SF_INFO" in detail:
            detail = "its header states no usable sample rate or number of channels: write it anew"
        advice = f": {_USE_OTHER}" if "not recognised" in detail else ""
        raise DataError(f"audio cannot be read: {detail.rstrip('.')}{advice}") from None
    found_s = len(wave) / rate_hz
    if is_mp3 and (held_s := mp3_seconds(path.read_bytes())) - found_s > _MAX_MP3_MISSING_S:
        raise DataError(
            f"audio is read in part: {found_s:.2f} s of about {held_s:.2f} s, because the MP3's header "
            f"states less than it holds: {_USE_OTHER}"
        )
    if stated_s - found_s > _MAX_MISSING_S:
        raise DataError(
            f"audio is cut off: {found_s:.2f} s of the {stated_s:.2f} s its header states"
        )
    _check_length(found_s, min_seconds, max_seconds)
    bad = int(np.count_nonzero(~np.isfinite(wave)))
    if bad:
        raise DataError(f"audio has {bad} samples that are NaN or infinite")
    peak = float(np.abs(wave).max())
    if peak < _SILENCE:
        raise DataError(f"audio is silent (peak {peak:.1e}, limit {_SILENCE:.0e} of full scale)")
    if peak > _MAX_PEAK:
        raise DataError(f"audio has a peak of {peak:g}: its samples are not scaled to ±1")
    common = math.gcd(rate_hz, target_rate_hz)
    if rate_hz // common * (target_rate_hz // common) > _MAX_KERNEL:
        raise DataError(
            f"audio has {rate_hz} Hz, which shares no factor with {target_rate_hz} Hz: "
            "resample it to a usual rate first"
        )
    return wave, rate_hz


def _stated_frames(file: soundfile.SoundFile) -> float:
    """The frames that the header promises; libsndfile counts those of the bytes that are there."""
    cut = _CUT_CHUNK.search(file.extra_info)
    if cut is None:
        return file.frames
    stated_bytes, found_bytes = map(int, cut.groups())
    if stated_bytes >= _STREAM_BYTES or found_bytes <= 0:
        return file.frames
    return file.frames * stated_bytes / found_bytes


def _check_length(seconds: float, min_seconds: float, max_seconds: float) -> None:
    if seconds == 0:
        raise DataError("audio has no samples")
    if seconds < min_seconds:
        raise DataError(f"audio is too short: {seconds:.3f} s, limit is {min_seconds:g} s")
    if seconds > max_seconds:
        raise DataError(f"audio is too long: {seconds:.1f} s, limit is {max_seconds:g} s")
