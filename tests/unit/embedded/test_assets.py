import csv
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

import higgs_tune
from higgs_tune.data.codec import encode_clip, load_codec
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import Row, content_hash, row_digest
from higgs_tune.embedded.make.arabic import sentences
from higgs_tune.embedded.make.checksums import checksums, read_sums
from higgs_tune.embedded.make.phrases import LANGUAGES, phrases

EMBEDDED = Path(higgs_tune.__file__).parent / "embedded"
HUMAN = ("english", "spanish", "french", "italian", "russian")
CORPORA = ("arabic", *HUMAN, "pretrain")


def rows(corpus: str, split: str) -> list[Row]:
    dataset = Dataset.open(f"embedded:{corpus}")
    return [dataset.row(index) for index in dataset.rows(split)]


def test_every_file_has_its_recorded_checksum() -> None:
    assert checksums(EMBEDDED) == read_sums(EMBEDDED / "SHA256SUMS")


def test_checksums_name_a_changed_a_missing_and_a_new_file(tmp_path: Path) -> None:
    for name in ("base/a", "codec/b"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("x")
    before = checksums(tmp_path)
    (tmp_path / "base/a").write_text("y")
    (tmp_path / "codec/b").rename(tmp_path / "codec/c")
    after = checksums(tmp_path)
    assert list(before) == ["base/a", "codec/b"]
    assert list(after) == ["base/a", "codec/c"]
    assert before["base/a"] != after["base/a"]


def test_assets_without_the_base_stay_small() -> None:
    folders = [EMBEDDED / name for name in ("codec", "speech", "wav")]
    size = sum(p.stat().st_size for folder in folders for p in folder.rglob("*") if p.is_file())
    assert size < 20e6


@pytest.mark.parametrize("corpus", CORPORA)
def test_splits_share_no_text(corpus: str) -> None:
    train, validation = ({row.text for row in rows(corpus, s)} for s in ("train", "validation"))
    assert train
    assert len(validation) >= 40
    assert not train & validation


@pytest.mark.parametrize("corpus", ["arabic", "pretrain"])
def test_splits_share_no_voice(corpus: str) -> None:
    train, validation = ({row.speaker for row in rows(corpus, s)} for s in ("train", "validation"))
    assert len(train) >= 8
    assert len(validation) >= 3
    assert not train & validation
    variants = [{speaker.split("-")[1] for speaker in split} for split in (train, validation)]
    assert not variants[0] & variants[1]


def test_pretraining_shares_no_arabic_voice_and_no_text_of_human_speech() -> None:
    pretrain = rows("pretrain", "train") + rows("pretrain", "validation")
    arabic = rows("arabic", "train") + rows("arabic", "validation")
    variants = [{row.speaker.split("-")[1] for row in part} for part in (pretrain, arabic)]
    assert not variants[0] & variants[1]
    texts = {row.text for row in pretrain}
    for corpus in HUMAN:
        assert not texts & {
            row.text for split in ("train", "validation") for row in rows(corpus, split)
        }
    assert {row.language for row in pretrain} == set(LANGUAGES)
    scripts = {unicodedata.name(c).split()[0] for text in texts for c in text if c.isalpha()}
    assert scripts == {"LATIN"}


@pytest.mark.parametrize("corpus", CORPORA)
def test_content_hash_and_counts_match_the_rows(corpus: str) -> None:
    info = Dataset.open(f"embedded:{corpus}").info
    found = rows(corpus, "train") + rows(corpus, "validation")
    assert content_hash(row_digest(row) for row in found) == info.content_hash
    assert len(found) == info.num_rows == len({row.id for row in found})
    frames = sum(row.num_frames[0] for row in found)
    assert frames / 25 / 3600 == pytest.approx(info.hours, abs=1e-4)
    assert max(int(row.codes[0].max()) for row in found) < info.codec.codebook_size == 256


@pytest.mark.parametrize("corpus", CORPORA)
def test_texts_are_composed_and_carry_no_punctuation(corpus: str) -> None:
    for row in rows(corpus, "train") + rows(corpus, "validation"):
        assert row.text == unicodedata.normalize("NFC", row.text.strip())
        assert not any(c in row.text for c in "[](){}<>.,;:!?؟،")


def test_no_codebook_collapsed() -> None:
    codes_TC = np.concatenate([row.codes[0] for row in rows("pretrain", "train")[:2000]])
    for codebook in codes_TC.T:
        used = np.bincount(codebook, minlength=256) / len(codebook)
        entropy = -(used[used > 0] * np.log(used[used > 0])).sum()
        assert entropy > 4.5, "out of ln 256 = 5.5 nats"


def test_sample_recordings_encode_to_nearly_all_of_the_shipped_codes() -> None:
    codec = load_codec("embedded")
    with (EMBEDDED / "wav/manifest.csv").open(encoding="utf-8", newline="") as handle:
        samples = list(csv.DictReader(handle))
    assert len(samples) >= 10
    known = {row.id: row for name in ("arabic", *HUMAN) for row in rows(name, "validation")}
    for sample in samples:
        wave, rate = soundfile.read(EMBEDDED / "wav" / sample["path"], dtype="float32")
        expected = known[sample["id"]]
        assert sample["text"] == expected.text
        codes_TC = encode_clip(codec, wave, rate)
        assert codes_TC.shape == expected.codes[0].shape
        # int16 scales differ by 1 in 32768; a near tie may fall to the other side.
        assert (codes_TC == expected.codes[0]).mean() > 0.95


def test_sample_conversations_name_recordings_that_exist() -> None:
    lines = (EMBEDDED / "wav/chat.jsonl").read_text(encoding="utf-8").splitlines()
    parts = [p for line in lines for m in json.loads(line)["messages"] for p in m["content"]]
    paths = {part["audio_url"] for part in parts if part["type"] == "audio"}
    assert len(paths) == len(lines) >= 10
    assert all((EMBEDDED / "wav" / path).is_file() for path in paths)


def test_authored_texts_are_reproducible_and_unique() -> None:
    assert sentences(720, seed=0) == sentences(720, seed=0)
    assert len(set(sentences(720, seed=0))) == 720
    for language in LANGUAGES:
        texts = phrases(language, 100, 0.5, seed=0)
        assert texts == phrases(language, 100, 0.5, seed=0)
        assert len(set(texts)) == 100


def test_any_two_arabic_voices_differ_in_mean_spectrum() -> None:
    from higgs_tune.embedded.make.espeak import Espeak
    from higgs_tune.embedded.make.voices import (
        ARABIC_TRAIN,
        ARABIC_VALIDATION,
    )

    codec, espeak = load_codec("embedded"), Espeak()
    import torch

    text = sentences(720, seed=0)[4]
    spectra = [
        codec.log_mel(torch.from_numpy(espeak.speak(text, "ar", voice))[None]).mean(1)[0]
        for voice in (*ARABIC_TRAIN, *ARABIC_VALIDATION)
    ]
    distances = torch.cdist(torch.stack(spectra), torch.stack(spectra)) / len(spectra[0]) ** 0.5
    nearest = distances.fill_diagonal_(float("inf")).min(1).values * 20 / np.log(10)
    assert float(nearest.min()) > 4, "mean spectra of two voices are within 4 dB"
