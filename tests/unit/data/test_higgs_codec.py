"""The real checkpoint's codec, small and random, behind the same functions as the embedded one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2TokenizerModel

from higgs_tune.data.codec import (
    Codec,
    decode_clip,
    encode_clip,
    load_codec,
    weights_digest,
)
from higgs_tune.errors import DataError, ModelError
from tests.codecs import RATIOS, save_tiny_higgs_codec

RATE_HZ = 24_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_higgs_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def codec(folder: Path) -> Codec:
    return load_codec(str(folder))


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)


def test_loaded_codec_is_in_eval_mode_and_codes_as_the_saved_one(
    codec: Codec, folder: Path
) -> None:
    assert isinstance(codec, HiggsAudioV2TokenizerModel)
    assert not any(module.training for module in codec.modules())
    stock = HiggsAudioV2TokenizerModel.from_pretrained(folder).eval()
    wave = noise(30_000)
    with torch.no_grad():
        expected = stock.encode(torch.from_numpy(wave)[None, None]).audio_codes[0].T
    np.testing.assert_array_equal(encode_clip(codec, wave, RATE_HZ), expected.numpy())


@pytest.mark.parametrize("num_samples", [960, 961, 2400, 24_000, 24_147, 24_148, 48_001])
def test_round_trip_keeps_the_length_to_within_a_frame(codec: Codec, num_samples: int) -> None:
    codes_TC = encode_clip(codec, noise(num_samples), RATE_HZ)
    assert codes_TC.dtype == np.uint16
    assert codes_TC.shape[1] == 8
    assert abs(len(codes_TC) - num_samples / 960) < 1
    assert len(np.unique(codes_TC)) > 1
    assert codes_TC.max() < codec.config.codebook_size
    wave = decode_clip(codec, codes_TC)
    assert wave.shape == (len(codes_TC) * 960,)
    assert np.isfinite(wave).all()


def test_padding_and_train_mode_change_codes(codec: Codec, folder: Path) -> None:
    """Why clips are coded one at a time, unpadded, by a codec in eval mode."""
    wave = noise(RATE_HZ)
    codes_TC = encode_clip(codec, wave, RATE_HZ)
    np.testing.assert_array_equal(codes_TC, encode_clip(codec, wave, RATE_HZ))
    padded = encode_clip(codec, np.pad(wave, (0, RATE_HZ)), RATE_HZ)
    assert (padded[: len(codes_TC)] != codes_TC).any()
    training = load_codec(str(folder)).train()
    with torch.no_grad():
        again = [training.encode(torch.from_numpy(wave)[None, None]).audio_codes for _ in range(2)]
    assert (again[0] != again[1]).any()
    with pytest.raises(AssertionError, match="would change the codes"):
        encode_clip(training, wave, RATE_HZ)


def test_clip_shorter_than_a_frame_is_refused(codec: Codec) -> None:
    with pytest.raises(DataError, match=r"959 samples at 24000 Hz, the codec needs 960"):
        encode_clip(codec, noise(959), RATE_HZ)


def test_digest_changes_with_the_weights(codec: Codec, folder: Path) -> None:
    other = load_codec(str(folder))
    assert weights_digest(other) == weights_digest(codec)
    with torch.no_grad():
        other.quantizer.quantizers[3].codebook.embed[5, 5] += 1e-3
    assert weights_digest(other) != weights_digest(codec)


def changed_config(folder: Path, to: Path, **changes) -> str:
    """A copy of the codec with these changes to its config.json; returns its path."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps(config))
    return str(to)


@pytest.mark.parametrize("changes", [{"semantic_sample_rate": 22_050}, {"sample_rate": 22_050}])
def test_sample_rates_that_do_not_match_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    path = changed_config(folder, tmp_path / "c", **changes)
    with pytest.raises(ModelError, match=r"semantic_sample_rate .* do not match"):
        load_codec(path)


def test_codebooks_that_the_weights_lack_are_named(folder: Path, tmp_path: Path) -> None:
    path = changed_config(folder, tmp_path / "c", target_bandwidths=[0.3, 2.4])
    with pytest.raises(ModelError, match=r"lacks \d+ weights, quantizer\.quantizers\.10\."):
        load_codec(path)


def test_empty_codebooks_are_refused(folder: Path, tmp_path: Path) -> None:
    path = changed_config(folder, tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    empty = {k: torch.zeros_like(w) if "codebook.embed" in k else w for k, w in weights.items()}
    save_file(empty, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its codebooks are empty"):
        load_codec(path)


def test_codes_of_another_shape_than_the_config_states_are_refused(
    folder: Path, monkeypatch
) -> None:
    encode = HiggsAudioV2TokenizerModel.encode

    def fewer(codec, input_values):
        return encode(codec, input_values, bandwidth=0.6)

    monkeypatch.setattr(HiggsAudioV2TokenizerModel, "encode", fewer)
    with pytest.raises(ModelError, match=r"gives 4 codebooks × 25 frames, .* says 8 × 25"):
        load_codec(str(folder))


def test_hop_is_the_product_of_the_ratios(codec: Codec) -> None:
    assert codec.config.hop_length == np.prod(RATIOS) == 960
    assert codec.config.frame_rate == 25
