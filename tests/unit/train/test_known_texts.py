"""Texts with characters that have no token are refused; no shipped text has any."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import higgs_tune
from higgs_tune import cli
from higgs_tune.base_source import EMBEDDED_BASE
from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation, TextPart, Turn
from higgs_tune.data.dataset import EMBEDDED, Dataset
from higgs_tune.data.shards import Row, write_dataset
from higgs_tune.data.tokens import Vocabulary, encode_conversation, unknown_in
from higgs_tune.errors import DataError
from higgs_tune.model.load import read_config, vocabulary_of
from higgs_tune.train.examples import check_texts

WAV = Path(higgs_tune.__file__).parent / "embedded" / "wav"
HINDI = "नमस्ते, आप कैसे हैं"


@pytest.fixture(scope="module")
def embedded() -> Vocabulary:
    config, tokenizer = read_config(EMBEDDED_BASE)
    return vocabulary_of(tokenizer, config)


def rewritten(folder: Path, **changes: Row) -> Dataset:
    """48 rows of Russian speech, some of them changed."""
    source = Dataset.open("embedded:russian")
    rows = [source.row(index) for index in range(40)]
    rows += [source.row(int(index)) for index in source.rows("validation")[:8]]
    rows = [changes.get(f"row{number}", row) for number, row in enumerate(rows)]
    write_dataset(folder, rows, source.info.codec)
    return Dataset.open(str(folder))


def row(number: int, **changes) -> Row:
    return replace(Dataset.open("embedded:russian").row(number), **changes)


@pytest.mark.parametrize("name", sorted(path.name for path in EMBEDDED.iterdir()))
def test_every_shipped_text_is_known(embedded: Vocabulary, name: str):
    dataset = Dataset.open(f"embedded:{name}")
    texts = list(dataset.texts())
    assert [row_id for row_id, _ in texts] == [dataset.row(n).id for n in range(len(texts))]
    assert len(texts) == dataset.info.num_rows
    assert all(parts and all(parts) for _, parts in texts)
    check_texts(dataset, embedded)


def test_every_text_of_the_shipped_recordings_is_known(embedded: Vocabulary):
    with (WAV / "manifest.csv").open(encoding="utf-8", newline="") as file:
        texts = [fields["text"] for fields in csv.DictReader(file)]
    assert texts
    chats = [json.loads(line) for line in (WAV / "chat.jsonl").read_text("utf-8").splitlines()]
    texts += [json.dumps(chat, ensure_ascii=False) for chat in chats]
    assert {one for text in texts for one in unknown_in(text, embedded)} == set()


def test_an_unknown_character_in_a_text_is_refused_and_named(embedded: Vocabulary):
    turns = (Turn("user", (TextPart("да"),)), Turn("assistant", (TextPart(HINDI),), target=True))
    with pytest.raises(
        DataError, match=r"row 7:chat: .*no token for 'ं' \(U\+0902\), .* and 2 more;"
    ):
        encode_conversation(Conversation("row 7:chat", "chat", turns), embedded)


@pytest.mark.parametrize(
    ("text", "characters"),
    [
        ("ascii, naïve, ЁЖ, هَلْ پ", []),
        ("a中b中", ["中"]),
        ("cafe\u0301", []),  # composed, it has a token
        ("e\u0323", ["\u1eb9"]),
        ("a<|unk|>b", ["a<|unk|>b"]),  # each character alone is known
        ("\U0001f600 ok", ["\U0001f600"]),
    ],
)
def test_unknown_characters_are_found_as_the_tokenizer_reads_them(
    embedded: Vocabulary, text: str, characters: list[str]
):
    assert unknown_in(text, embedded) == characters


def test_a_tokenizer_without_an_unknown_token_accepts_every_text(embedded: Vocabulary, tmp_path):
    every = replace(embedded, unknown=None)
    check_texts(rewritten(tmp_path, row3=row(3, text=HINDI)), every)
    assert unknown_in(HINDI, every) == []


def test_all_texts_of_all_rows_are_checked(embedded: Vocabulary, tmp_path):
    chat = json.dumps(
        [
            {"role": "user", "parts": [{"type": "text", "text": "ж 中"}]},
            {"role": "assistant", "parts": [{"type": "audio", "audio": 0}]},
        ]
    )
    reference = row(9).codes + row(8).codes
    dataset = rewritten(
        tmp_path,
        row5=row(5, text="да ☕"),
        row9=row(9, codes=reference, ref_text="нет 😀"),
        row12=row(12, kind="chat", turns=chat, start_index=1),
    )
    first = dataset.row(5).id
    message = (  # says nothing of training: `evaluate` shows it, too
        rf"in 3 of 48 rows \(first {first!r}\) the base's tokenizer has no token for "
        r"'☕' \(U\+2615\), '中' \(U\+4E2D\), '😀' \(U\+1F600\); it reads all such "
        r"characters as one\. .* or use a base whose"
    )
    with pytest.raises(DataError, match=message):
        check_texts(dataset, embedded)
    for number in (5, 9, 12):  # training would refuse the same rows
        one = dataset.row(number)
        talk = tasks.chat(one) if one.kind == "chat" else tasks.clone(one, one)
        with pytest.raises(DataError, match="no token for"):
            encode_conversation(talk, embedded)


@pytest.mark.parametrize("command", ["check", "evaluate"])
def test_check_and_evaluate_refuse_texts_with_unknown_characters(tmp_path, capsys, command: str):
    rewritten(tmp_path / "data", row3=row(3, text=HINDI))
    arguments = [command, "--data", str(tmp_path / "data")]
    if command == "evaluate":
        arguments += ["--adapter", "none", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'data'}: in 1 of 48 rows" in error
    assert "no token for 'ं' (U+0902), 'आ' (U+0906)" in error
