"""The judges from other packages: present, missing, and with bad input."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from higgs_tune.errors import ConfigError, ModelError
from higgs_tune.listen import voices
from higgs_tune.listen.voices import Recogniser, VoiceJudge

CPU = torch.device("cpu")


class FakeEncoder:
    """Embeds a wave by its mean and its length."""

    def __init__(self, device, verbose):
        assert (device, verbose) == ("cpu", False)

    def embed_utterance(self, wave):
        vector = np.array([wave.mean(), 1.0])
        return vector / np.linalg.norm(vector)


@pytest.fixture
def resemblyzer(monkeypatch):
    fake = SimpleNamespace(
        VoiceEncoder=FakeEncoder, preprocess_wav=lambda wave: wave[: 0 if wave[0] < 0 else None]
    )
    monkeypatch.setitem(sys.modules, "resemblyzer", fake)


def test_without_resemblyzer_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(ConfigError, match=r'pip install "higgs-tune\[listen\]"'):
        VoiceJudge(CPU)


def test_similarity_is_the_cosine_of_resemblyzers_embeddings(resemblyzer):
    judge = VoiceJudge(CPU)
    loud, soft = np.full(16_000, 0.75, np.float32), np.full(16_000, 0.25, np.float32)
    expected = (0.75 * 0.25 + 1) / np.sqrt((0.75**2 + 1) * (0.25**2 + 1))
    assert judge.similarity(loud, soft, 16_000) == pytest.approx(expected, rel=1e-6)
    assert judge.similarity(loud, loud, 24_000) == pytest.approx(1)


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros(100), np.full(100, -0.5)])
def test_a_clip_without_a_voice_has_no_similarity(resemblyzer, wave):
    judge = VoiceJudge(CPU)
    assert judge.similarity(wave.astype(np.float32), np.ones(100, np.float32), 16_000) is None


@pytest.fixture(scope="module")
def recogniser_path(tmp_path_factory):
    """A tiny wav2vec 2.0 that hears an "a" in everything."""
    folder = tmp_path_factory.mktemp("asr")
    (folder / "vocab.json").write_text('{"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}')
    config = Wav2Vec2Config(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_stride=(8, 8), conv_kernel=(8, 8),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, pad_token_id=0,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0]))
    model.save_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), unk_token="<unk>", pad_token="<pad>"
    )
    Wav2Vec2Processor(
        feature_extractor=Wav2Vec2FeatureExtractor(sampling_rate=16_000), tokenizer=tokenizer
    ).save_pretrained(folder)
    return folder


def test_a_wav2vec2_recogniser_gives_texts_and_error_rates(recogniser_path):
    recogniser = Recogniser(str(recogniser_path), CPU, None, None)
    wave = np.random.default_rng(0).standard_normal(24_000).astype(np.float32)
    heard = recogniser.text_of(wave, 24_000)
    assert heard == "a"
    assert recogniser.error_rate(heard, "A.") == 0
    assert recogniser.error_rate(heard, "ab") == 0.5
    assert recogniser.error_rate(heard, "…") is None
    assert recogniser.text_of(wave[:0], 24_000) == ""


class FakeWhisper:
    """Refuses languages and long clips only when called, as transformers' Whisper pipeline does."""

    type = "seq2seq_whisper"
    feature_extractor = SimpleNamespace(sampling_rate=16_000, n_samples=480_000)

    def __call__(self, clip, generate_kwargs=None, return_timestamps=False):
        language = (generate_kwargs or {}).get("language", "arabic")
        if language != "arabic":
            raise ValueError(f"Unsupported language: {language}")
        if len(clip["raw"]) > 480_000 and not return_timestamps:
            raise ValueError("You have passed more than 3000 mel input features (> 30 seconds)")
        return {"text": "نعم"}


@pytest.mark.parametrize("language", [None, "arabic"])
@pytest.mark.parametrize("seconds", [30, 31])
def test_whisper_hears_clips_of_any_length(monkeypatch, language, seconds):
    monkeypatch.setattr(voices, "pipeline", lambda *_, **__: FakeWhisper())
    wave = np.ones(seconds * 16_000, np.float32)
    assert Recogniser("whisper", CPU, None, language).text_of(wave, 16_000) == "نعم"


def test_an_unknown_language_is_an_error_before_the_first_clip(monkeypatch):
    monkeypatch.setattr(voices, "pipeline", lambda *_, **__: FakeWhisper())
    assert Recogniser("whisper", CPU, None, "arabic").text_of(np.ones(9, np.float32), 16_000)
    with pytest.raises(
        ConfigError, match=r"^--asr-language arabicc: whisper does not accept it: Uns"
    ):
        Recogniser("whisper", CPU, None, "arabicc")


def test_a_folder_that_is_no_recogniser_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match=r"--asr .*not a speech recognition checkpoint"):
        Recogniser(str(tmp_path), CPU, None, None)
