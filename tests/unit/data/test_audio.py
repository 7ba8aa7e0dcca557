"""Recordings of all usual kinds are read as mono; the error for an unusable one says why."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from higgs_tune.data.audio import locate, read_clip
from higgs_tune.data.mp3 import mp3_seconds
from higgs_tune.errors import DataError


def tone(seconds: float, rate_hz: int = 24000) -> np.ndarray:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.3 * np.sin(2 * np.pi * 220 * time_s)).astype(np.float32)


def read(path: Path, target_rate_hz: int = 24000) -> tuple[np.ndarray, int]:
    return read_clip(path, min_seconds=0.1, max_seconds=30, target_rate_hz=target_rate_hz)


def store(path: Path, wave: np.ndarray, rate_hz: int = 24000, subtype: str = "FLOAT") -> Path:
    soundfile.write(path, wave, rate_hz, subtype=subtype)
    return path


def test_channels_are_averaged(tmp_path: Path):
    left = tone(0.5)
    wave, rate_hz = read(store(tmp_path / "a.wav", np.stack([left, 0 * left], axis=1)))
    np.testing.assert_allclose(wave, left / 2, atol=1e-7)
    assert (rate_hz, wave.dtype) == (24000, np.float32)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_usual_rates_and_formats_are_read(tmp_path: Path, rate_hz: int, ending: str):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(0.3, rate_hz), rate_hz)
    wave, found_hz = read(path)
    assert (len(wave), found_hz) == (round(0.3 * rate_hz), rate_hz)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "ALAW", "IMA_ADPCM"])
def test_telephone_codings_are_read(tmp_path: Path, subtype: str):
    """libsndfile cannot seek in the first two."""
    wave, rate_hz = read(store(tmp_path / "a.wav", tone(1, 8000), 8000, subtype))
    assert rate_hz == 8000
    assert 8000 <= len(wave) < 8800, "whole blocks"


@pytest.mark.parametrize(
    "wave, message",
    [
        (tone(0.05), r"too short: 0\.050 s, limit is 0\.1 s"),
        (tone(600, 8000), r"too long: 200\.0 s, limit is 30 s"),  # its header says 24 kHz
        (tone(0), "no samples"),
        (tone(1) * 0, r"silent \(peak 0\.0e\+00"),
        (tone(1) * 20000, r"peak of 6000: its samples are not scaled"),
        (np.where(np.arange(24000) < 3, np.nan, tone(1)), "3 samples that are NaN or infinite"),
        (np.where(np.arange(24000) < 1, np.inf, tone(1)), "1 samples that are NaN or infinite"),
    ],
)
def test_unusable_waves_are_refused(tmp_path: Path, wave: np.ndarray, message: str):
    with pytest.raises(DataError, match=message):
        read(store(tmp_path / "a.wav", wave))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read: the file is empty"),
        (b"this is no audio at all" * 9, "Format not recognised: convert it to WAV or FLAC"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be read"),
    ],
)
def test_files_that_are_not_audio_are_refused(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["a.raw", "a.RAW"])
def test_the_error_for_samples_without_a_header_says_what_to_do(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(bytes(48000))
    with pytest.raises(DataError, match="has no header: convert it to WAV or FLAC"):
        read(tmp_path / name)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 16000, 24000, 44100, 48000])
@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
def test_a_whole_mp3_is_read(tmp_path: Path, rate_hz: int, mode: str):
    path, wave = tmp_path / "a.mp3", tone(2, rate_hz)
    soundfile.write(path, wave, rate_hz, bitrate_mode=mode, compression_level=0.5)
    found, _ = read(path)
    assert len(found) == len(wave)
    assert mp3_seconds(path.read_bytes()) == pytest.approx(2, abs=0.25)


def test_an_mp3_without_a_stated_length_is_not_read_in_part(tmp_path: Path):
    path = tmp_path / "a.mp3"
    wave = np.concatenate([np.full(96000, 1e-4), np.random.default_rng(0).normal(0, 0.1, 96000)])
    soundfile.write(path, wave, 24000, bitrate_mode="VARIABLE", compression_level=0.5)
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xf3", content.index(b"Xing")) :])
    with pytest.raises(DataError, match=r"read in part: 2\.\d+ s of about 8\.\d+ s.*WAV or FLAC"):
        read(path)


def test_an_mp3_of_two_joined_files_is_not_read_in_part(tmp_path: Path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, tone(3), 24000)
    tag = b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256)
    path.write_bytes(tag + path.read_bytes() + tag + path.read_bytes())
    with pytest.raises(DataError, match=r"read in part: 3\.\d+ s of about 6\.\d+ s"):
        read(path)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_of_two_joined_files_is_not_read_in_part(tmp_path: Path, codec: str):
    path = tmp_path / "a.ogg"
    soundfile.write(path, tone(2), 24000, format="OGG", subtype=codec)
    assert len(read(path)[0]) == 2 * 24000
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(DataError, match="only be read in part: it holds several joined recordings"):
        read(path)


def test_an_mp3_frame_counts_only_if_another_follows():
    header = bytes.fromhex("fff344c0")  # MPEG 2, layer III, 32 kbit/s, 24 kHz
    frame = header + bytes(96 - 4)
    assert mp3_seconds(3 * frame) == pytest.approx(3 * 0.024)
    assert mp3_seconds(header + bytes(500)) == 0
    assert mp3_seconds(b"RIFF" + bytes(500)) == 0


@pytest.mark.parametrize("ending", ["wav", "aiff", "au", "mp3"])
def test_a_recording_that_was_cut_off_is_refused(tmp_path: Path, ending: str):
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, tone(3), 24000)
    assert len(read(path)[0]) == 72000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut off: 1\.[345]\d s of the 3\.00 s its header states"):
        read(path)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_stream_without_a_stated_length_is_read(tmp_path: Path, size: int):
    path = store(tmp_path / "a.wav", tone(1), subtype="PCM_16")
    content = path.read_bytes()
    assert content[36:40] == b"data"
    path.write_bytes(content[:40] + size.to_bytes(4, "little") + content[44:])
    assert len(read(path)[0]) == 24000


def test_a_few_missing_samples_are_accepted(tmp_path: Path):
    path = store(tmp_path / "a.wav", tone(1), subtype="PCM_16")
    path.write_bytes(path.read_bytes()[:-1000])
    assert len(read(path)[0]) == 23500


def test_a_rate_with_too_small_a_common_factor_is_refused(tmp_path: Path):
    with pytest.raises(
        DataError, match="22051 Hz, which has too small a common factor with 24000 Hz"
    ):
        read(store(tmp_path / "a.wav", tone(0.5, 22051), 22051))


@pytest.mark.parametrize(
    ("rate_hz", "message"),
    [
        (0, "its header states no usable sample rate or number of channels: rewrite it"),
        (
            1,
            "header states a sample rate of 1 Hz, needed 4000 to 400000 Hz: rewrite it with its true rate",
        ),
        (10**7, "header states a sample rate of 10000000 Hz, needed 4000"),
        (2**32 - 1, "its header states no usable sample rate"),
    ],
)
def test_an_impossible_sample_rate_is_refused(tmp_path: Path, rate_hz: int, message: str):
    path = store(tmp_path / "a.wav", tone(0.5), subtype="PCM_16")
    content = path.read_bytes()
    path.write_bytes(content[:24] + rate_hz.to_bytes(4, "little") + content[28:])
    with pytest.raises(DataError, match=message):
        read(path)


def test_paths_must_stay_inside_the_data_root(tmp_path: Path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    inside, outside = root / "sub" / "a.wav", tmp_path / "b.wav"
    for path in (inside, outside):
        store(path, tone(0.2))
    (root / "link.wav").symlink_to(outside)
    (root / "loop.wav").symlink_to("loop.wav")
    (root / "good.wav").symlink_to(inside)
    for name in ("sub/a.wav", str(inside), "sub/../sub/a.wav", "good.wav"):
        assert locate(root, name) == inside.resolve()
    for name in ("../b.wav", str(outside), "link.wav"):
        with pytest.raises(DataError, match="is outside the data root"):
            locate(root, name)
    with pytest.raises(
        DataError, match=r"audio 'missing\.wav' does not exist .*: correct the path or set --data"
    ):
        locate(root, "missing.wav")
    with pytest.raises(DataError, match="audio 'sub' is not a file"):
        locate(root, "sub")
    for name in ("loop.wav", "a\0.wav", "x" * 5000):
        with pytest.raises(DataError, match=r"not a usable path|does not exist"):
            locate(root, name)


@pytest.mark.parametrize("written, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_is_found_whatever_its_unicode_form(tmp_path: Path, written: str, stored: str):
    path = store(tmp_path / unicodedata.normalize(stored, "أحمد.wav"), tone(0.5))
    assert locate(tmp_path.resolve(), unicodedata.normalize(written, "أحمد.wav")) == path.resolve()
    with pytest.raises(DataError, match="does not exist"):
        locate(tmp_path.resolve(), "آمنة.wav")


def test_a_path_is_found_as_windows_writes_it(tmp_path: Path):
    root = tmp_path.resolve() / "root"
    (root / "أحمد").mkdir(parents=True)
    path = store(root / "أحمد" / "a.wav", tone(0.5))
    assert locate(root, r"أحمد\a.wav") == locate(root, r".\أحمد\a.wav") == path
    store(tmp_path / "b.wav", tone(0.5))
    with pytest.raises(DataError, match="is outside the data root"):
        locate(root, r"..\b.wav")
    store(root / r"أحمد\a.wav", tone(0.5))
    assert locate(root, r"أحمد\a.wav").name == r"أحمد\a.wav", "a file name may hold a backslash"


def test_the_error_for_a_flac_without_a_stated_length_says_what_to_do(tmp_path: Path):
    path = store(tmp_path / "a.flac", tone(0.5), subtype="PCM_16")
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # zero the 36-bit sample count in STREAMINFO, as encoders to a pipe do
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(DataError, match="states no length: convert it to WAV or FLAC"):
        read(path)
