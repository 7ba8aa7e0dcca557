import json
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import higgs_tune
from higgs_tune.data.dataset import Dataset
from higgs_tune.embedded.make.tokenizer import (
    CONTROL_TOKENS,
    HEADER_PIECES,
    build_tokenizer,
    characters,
)

EMBEDDED = Path(higgs_tune.__file__).parent / "embedded"
CORPORA = ("arabic", "english", "spanish", "french", "italian", "russian")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED / "base")


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_embedded_text_round_trips_without_unknown_tokens(
    tokenizer: PreTrainedTokenizerBase, corpus: str
) -> None:
    dataset = Dataset.open(f"embedded:{corpus}")
    texts = {dataset.row(i).text for split in ("train", "validation") for i in dataset.rows(split)}
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids, text
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text


def test_spaces_and_punctuation_round_trip_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    text = " a  b . c ,\n d's “e” ، ؟ ЁЖ ß "
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_decomposed_text_is_composed(tokenizer: PreTrainedTokenizerBase) -> None:
    decomposed = unicodedata.normalize("NFD", "él señor")
    ids = tokenizer(decomposed, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == "él señor"


def test_unknown_character_is_one_unknown_token(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("a中b", add_special_tokens=False).input_ids
    assert [i == tokenizer.unk_token_id for i in ids] == [False, True, False]


@pytest.mark.parametrize("token", [*CONTROL_TOKENS, *HEADER_PIECES])
def test_control_tokens_and_header_pieces_are_one_token(
    tokenizer: PreTrainedTokenizerBase, token: str
) -> None:
    ids = tokenizer(token, add_special_tokens=False).input_ids
    assert ids == [tokenizer.convert_tokens_to_ids(token)]
    assert ids != [tokenizer.unk_token_id] or token == tokenizer.unk_token


def test_a_turn_has_one_token_for_its_role(tokenizer: PreTrainedTokenizerBase) -> None:
    turn = "<|start_header_id|>user<|end_header_id|>\n\nthe user<|eot_id|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(turn, add_special_tokens=False).input_ids)
    assert tokens[:4] == ["<|start_header_id|>", "user", "<|end_header_id|>", "\n\n"]
    assert tokens[4:] == [*"the user", "<|eot_id|>"]


def test_no_special_tokens_are_added_by_default(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids


def test_saved_tokenizer_is_the_one_that_the_script_builds(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    fresh = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    saved = json.loads((EMBEDDED / "base/tokenizer.json").read_text(encoding="utf-8"))
    assert fresh == saved


def test_characters_are_composed_and_unique() -> None:
    known = characters()
    assert len(set(known)) == len(known)
    assert all(unicodedata.normalize("NFC", c) == c for c in known)
