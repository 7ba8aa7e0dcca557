"""Read recordings as mono waves, or say why one cannot be used."""

import math
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import soundfile

from higgs_tune.data.mp3 import mp3_seconds
from higgs_tune.data.ogg import is_joined_ogg
from higgs_tune.data.plain_text import is_utf8
from higgs_tune.errors import DataError

_SHOWN_CHARS = 120
_SILENCE = 1e-4  # peak of full scale 1: -80 dB
_MAX_PEAK = 16.0  # a float file above this was never scaled to ±1
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 400_000  # anything else is an error in the header
# Limit on the product of the two rates, each divided by their greatest common factor: torchaudio's
# resampling kernel has about that many elements.
_MAX_KERNEL = 50_000_000
# The line that libsndfile logs for a chunk of samples that is shorter than its header states.
_CUT_CHUNK = re.compile(r"^\s*(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAM_BYTES = 0x7FFF0000  # sizes from here on are placeholders for a length not known yet
_UNKNOWN_FRAMES = 2**62  # reported for a FLAC that was written to a pipe
_MAX_MISSING_S = 0.1  # shorter than a word; some encoders count a frame too many
_MAX_MP3_MISSING_S = 0.3  # mp3_seconds also counts the decoder's delay and the encoder's padding
_UNOPENED = "audio cannot be opened"
_ABSENT = "does not exist"
_DISK_FAILED = "System error"  # libsndfile's words for a failed read, as of a network file system
_USE_OTHER = "convert it to WAV or FLAC, for example with ffmpeg"


def locate(root: Path, name: str) -> Path:
    """Return the path of a file that a manifest names, with symlinks resolved.

    Args:
        root: the data root, already resolved.

    Raises:
        DataError: the file is outside `root`, missing, or not a regular file.
    """
    shown = name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}…"
    try:
        path = find_spelling(root, name).resolve()
        if not path.is_relative_to(root):
            raise DataError(
                f"audio {shown!r} is outside the data root {root}: move it inside or set --data-root"
            )
        if not path.is_file():
            state = "is not a file" if path.exists() else _ABSENT
            raise DataError(
                f"audio {shown!r} {state} (looked in {root}): correct the path or set --data-root"
            )
        if not is_utf8(str(path)):  # soundfile cannot open it
            raise DataError(f"audio {shown!r} links to a file whose name is not UTF-8: rename it")
    except (OSError, ValueError, RuntimeError) as error:
        detail = getattr(error, "strerror", None) or error
        raise DataError(f"audio {shown!r} is not a usable path ({detail})") from None
    return path


def find_spelling(root: Path, name: str) -> Path:
    """Return `root / name`, or another spelling of it if only that one exists.

    macOS decomposes accented letters (NFD); Windows writes `\\` for `/`.
    """
    path = root / name
    if (name.isascii() and "\\" not in name) or path.exists():
        return path
    slashes = name.replace("\\", "/")
    others = (root / unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))
    return next((other for other in others if other.exists()), path)


def may_be_temporary(reason: str) -> bool:
    """Whether a rejection comes from the file system and may not recur later or on another machine."""
    return _UNOPENED in reason or _ABSENT in reason


def can_be_opened(root: Path, name: str) -> bool:
    """Whether a file that a manifest names exists and is readable now."""
    try:
        return os.access(locate(root, name), os.R_OK)
    except DataError:
        return False


def read_clip(
    path: Path, *, min_seconds: float, max_seconds: float, target_rate_hz: int
) -> tuple[np.ndarray, int]:
    """Read a recording of any rate and channel count as (float32 mono wave, its own rate in Hz).

    Channels are averaged. The length is checked before samples are read.

    Raises:
        DataError: the file cannot be opened, is not audio, is cut off, is an MP3 that holds more than its
            header states, is an Ogg file of several recordings, is too short, too long or silent, has
            non-finite or unscaled samples, or has a rate that is implausible or cannot be resampled to
            `target_rate_hz`.
    """
    if path.suffix.lower() == ".raw":  # soundfile asks for a rate because of the name alone
        raise DataError(f"audio cannot be read: a .raw file has no header: {_USE_OTHER}")
    try:
        path.open("rb").close()  # libsndfile does not say why a file cannot be opened
    except OSError as error:
        raise DataError(f"{_UNOPENED}: {error.strerror}") from None
    try:
        with soundfile.SoundFile(path) as file:
            rate_hz = file.samplerate
            if not _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ:
                raise DataError(
                    f"audio's header states a sample rate of {rate_hz} Hz, needed {_MIN_RATE_HZ} to "
                    f"{_MAX_RATE_HZ} Hz: rewrite it with its true rate"
                )
            stated_s = _stated_frames(file) / rate_hz
            if file.frames >= _UNKNOWN_FRAMES:
                raise DataError(f"audio's header states no length: {_USE_OTHER}")
            _check_length(file.frames / rate_hz, min_seconds, max_seconds)
            # soundfile must be able to seek unless it gets the number of frames
            samples = file.read(file.frames, dtype="float32", always_2d=True)
            wave = samples.mean(axis=1)
            container = file.format
    except (soundfile.LibsndfileError, OSError) as error:
        detail = str(error).split(": ", 1)[-1]
        if detail.startswith(_DISK_FAILED):
            raise DataError(f"{_UNOPENED}: {_DISK_FAILED}") from None
        detail = detail if path.stat().st_size else "the file is empty"
        if "SF_INFO" in detail:
            detail = "its header states no usable sample rate or number of channels: rewrite it"
        advice = f": {_USE_OTHER}" if "not recognised" in detail else ""
        raise DataError(f"audio cannot be read: {detail.rstrip('.')}{advice}") from None
    found_s = len(wave) / rate_hz
    if container == "OGG" and is_joined_ogg(path.read_bytes()):
        raise DataError(
            f"audio can only be read in part: it holds several joined recordings: {_USE_OTHER}"
        )
    if (
        container == "MP3"
        and (held_s := mp3_seconds(path.read_bytes())) - found_s > _MAX_MP3_MISSING_S
    ):
        raise DataError(
            f"audio can only be read in part: {found_s:.2f} s of about {held_s:.2f} s, because the MP3's "
            f"header states less than the file holds: {_USE_OTHER}"
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
            f"audio has a sample rate of {rate_hz} Hz, which has too small a common factor with "
            f"{target_rate_hz} Hz: resample it to a usual rate first"
        )
    return wave, rate_hz


def _stated_frames(file: soundfile.SoundFile) -> float:
    """The number of frames that the header states; libsndfile counts only those that are present."""
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
