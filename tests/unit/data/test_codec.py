import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import higgs_tune
from higgs_tune.data.codec import decode_clip, encode_clip, load_codec
from higgs_tune.data.mel_codec import MelRvqCodec
from higgs_tune.errors import DataError, ModelError, NoMemoryError

WAVS = Path(higgs_tune.__file__).parent / "embedded" / "wav"


@pytest.fixture(scope="module")
def codec() -> MelRvqCodec:
    codec = load_codec("embedded")
    assert isinstance(codec, MelRvqCodec)
    return codec


def speech() -> dict[str, np.ndarray]:
    """The embedded original recordings, by name."""
    paths = sorted(WAVS.glob("*.wav"))
    waves = {
        p.stem: soundfile.read(p, dtype="float32")[0] for p in paths if "decoded" not in p.stem
    }
    assert len(waves) >= 6
    return waves


def log_mel_error_db(codec: MelRvqCodec, wave: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of two clips' log mel magnitudes, in dB."""
    mels = [codec.log_mel(torch.from_numpy(w)[None]) for w in (wave, other)]
    length = min(m.shape[1] for m in mels)
    return float((mels[0][:, :length] - mels[1][:, :length]).abs().mean()) * 20 / np.log(10)


@pytest.mark.parametrize("num_samples", [1, 959, 960, 961, 24_000, 24_001])
def test_num_frames_is_ceil_of_samples_over_hop(codec: MelRvqCodec, num_samples: int) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    codes_TC = encode_clip(codec, wave, 24_000)
    assert codes_TC.shape == (-(-num_samples // 960), 8)
    assert codes_TC.dtype == np.uint16
    assert codes_TC.max() < codec.config.codebook_size


@pytest.mark.parametrize("num_frames", [1, 2, 40])
def test_decoded_wave_has_hop_samples_per_frame(codec: MelRvqCodec, num_frames: int) -> None:
    codes_TC = np.random.default_rng(0).integers(0, 256, (num_frames, 8)).astype(np.uint16)
    wave = decode_clip(codec, codes_TC)
    assert wave.shape == (num_frames * 960,)
    assert np.isfinite(wave).all()


@pytest.fixture(scope="module")
def decoded(codec: MelRvqCodec) -> list[tuple[np.ndarray, dict[int, np.ndarray]]]:
    """Recordings, each with its decoded wave for each number of codebooks."""
    found = []
    for wave in list(speech().values())[:3]:
        codes_TC = encode_clip(codec, wave, 24_000)
        found.append((wave, {n: decode_clip(codec, codes_TC[:, :n]) for n in (1, 2, 4, 8)}))
    return found


def test_round_trip_gets_better_with_more_codebooks(codec: MelRvqCodec, decoded) -> None:
    errors = [
        np.mean([log_mel_error_db(codec, wave, by_number[n]) for wave, by_number in decoded])
        for n in (1, 2, 4, 8)
    ]
    assert all(more < fewer for fewer, more in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.75 * errors[0], errors


def test_another_clip_is_further_away_than_the_decoded_one(codec: MelRvqCodec, decoded) -> None:
    for (wave, by_number), (other, _) in itertools.pairwise([*decoded, decoded[0]]):
        own = log_mel_error_db(codec, wave, by_number[8])
        assert own < 0.7 * log_mel_error_db(codec, wave, other)


def test_codes_and_wave_are_the_same_every_time(codec: MelRvqCodec) -> None:
    wave = next(iter(speech().values()))
    codes_TC = encode_clip(codec, wave, 24_000)
    np.testing.assert_array_equal(codes_TC, encode_clip(codec, wave, 24_000))
    before = torch.random.get_rng_state()
    first = decode_clip(codec, codes_TC)
    torch.rand(3)
    np.testing.assert_array_equal(first, decode_clip(codec, codes_TC))
    torch.random.set_rng_state(before)


def test_decode_leaves_the_random_state_alone(codec: MelRvqCodec) -> None:
    before = torch.random.get_rng_state()
    decode_clip(codec, np.zeros((2, 8), np.uint16))
    assert torch.equal(before, torch.random.get_rng_state())


def test_saved_codec_loads_and_gives_the_same_codes(codec: MelRvqCodec, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    again = load_codec(str(tmp_path))
    wave = next(iter(speech().values()))
    np.testing.assert_array_equal(
        encode_clip(codec, wave, 24_000), encode_clip(again, wave, 24_000)
    )
    torch.testing.assert_close(dict(again.named_parameters()), dict(codec.named_parameters()))


def test_interface_is_that_of_the_higgs_tokenizer(codec: MelRvqCodec) -> None:
    assert codec.config.sample_rate == 24_000
    assert codec.config.hop_length == 960
    assert codec.config.frame_rate == 25
    assert codec.config.num_quantizers == 8
    codes_BCT = codec.encode(torch.zeros(2, 1, 2000)).audio_codes
    assert codes_BCT.shape == (2, 8, 3)
    assert codes_BCT.dtype == torch.int64
    assert codec.decode(codes_BCT).audio_values.shape == (2, 1, 2880)


def test_other_rates_are_resampled(codec: MelRvqCodec) -> None:
    time_s = np.arange(8000) / 8000
    low = np.sin(2 * np.pi * 440 * time_s).astype(np.float32) * 0.1
    codes_TC = encode_clip(codec, low, 8000)
    time_s = np.arange(24_000) / 24_000
    high = np.sin(2 * np.pi * 440 * time_s).astype(np.float32) * 0.1
    inner = slice(2, -2)  # resampling smears the ends
    np.testing.assert_array_equal(codes_TC[inner, 0], encode_clip(codec, high, 24_000)[inner, 0])
    assert codes_TC.shape == (25, 8)


def test_silence_decodes_to_near_silence(codec: MelRvqCodec) -> None:
    wave = decode_clip(codec, encode_clip(codec, np.zeros(24_000, np.float32), 24_000))
    assert np.abs(wave).max() < 0.01


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(0, np.float32), "needed one channel with samples"),
        (np.zeros((2, 100), np.float32), "needed one channel"),
        (np.array([0.0, np.nan], np.float32), "not finite"),
    ],
)
def test_unfit_wave_is_refused(codec: MelRvqCodec, wave: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_clip(codec, wave, 24_000)


def test_wrong_shapes_are_refused(codec: MelRvqCodec) -> None:
    with pytest.raises(ValueError, match=r"shape \(B, 1, N\)"):
        codec.encode(torch.zeros(1, 2, 100))
    with pytest.raises(ValueError, match=r"shape \(B, C, T\)"):
        codec.decode(torch.zeros(1, 8, 0, dtype=torch.int64))


def test_loading_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_codec(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_codec(str(tmp_path))
    with pytest.raises(ModelError, match="needs a revision"):
        load_codec("someone/some-codec")
    (tmp_path / "config.json").write_text('{"model_type": "dac"}')
    with pytest.raises(ModelError, match="model_type is 'dac'"):
        load_codec(str(tmp_path))


def test_codec_without_weights_is_refused(codec: MelRvqCodec, tmp_path: Path) -> None:
    codec.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_codec(str(tmp_path))


@pytest.mark.parametrize("where", ["from_pretrained", "to", "encode"])
def test_out_of_memory_is_not_reported_as_a_bad_codec(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_, **__) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(MelRvqCodec, where, fail)
    with pytest.raises(
        NoMemoryError, match=r"codec embedded: not enough memory on cpu: .* 2\.00 GiB"
    ):
        load_codec("embedded")
