"""Rows and small datasets for tests of the code that reads them."""

import json
from pathlib import Path

import numpy as np

from higgs_tune.data.conversation import AudioPart, Conversation, TextPart
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import CodecFacts, Row, write_dataset
from higgs_tune.data.tokens import Vocabulary, encode_conversation

CODEC = CodecFacts("fake", 24000, 25.0, num_codebooks=2, codebook_size=256)
LETTERWISE = Vocabulary(
    *range(1, 9),
    stream_bos=256,
    stream_eos=257,
    num_codebooks=2,
    encode_text=lambda text: (
        [9] if text in ("user", "assistant", "\n\n") else [10 + ord(c) for c in text]
    ),
)


def clip(
    number: int,
    split: str = "train",
    speaker: str = "s0",
    text: str | None = None,
    num_frames: int | None = None,
    ref_text: str | None = None,
) -> Row:
    rng = np.random.default_rng(number)

    def codes(frames: int) -> np.ndarray:
        return rng.integers(0, 256, (frames, 2)).astype(np.uint16)

    frames = num_frames or int(rng.integers(5, 60))
    return Row(
        id=f"r{number}",
        split=split,  # type: ignore[arg-type]
        kind="clip",
        speaker=speaker,
        text=f"text {number}" if text is None else text,
        codes=(codes(frames),) if ref_text is None else (codes(frames), codes(7)),
        ref_text=ref_text,
    )


def chat(number: int) -> Row:
    turns = [
        {"role": "user", "parts": [{"type": "text", "text": "ask"}]},
        {"role": "assistant", "parts": [{"type": "audio", "audio": 0}]},
        {"role": "user", "parts": [{"type": "audio", "audio": 1}]},
        {"role": "assistant", "parts": [{"type": "text", "text": "say"}]},
    ]
    codes = tuple(np.full((k + 3, 2), k, dtype=np.uint16) for k in range(2))
    text = json.dumps(turns)
    return Row(f"c{number}", "train", "chat", "s0", "say", codes, turns=text, start_index=2)


def make(path: Path, rows: list[Row], rows_per_shard: int = 1024) -> Dataset:
    write_dataset(path, rows, CODEC, rows_per_shard=rows_per_shard)
    return Dataset.open(str(path))


def row_of(conversation: Conversation) -> str:
    return conversation.key.split(":")[0]


def audio(conversation: Conversation, turn: int) -> np.ndarray:
    part = conversation.turns[turn].parts[0]
    assert isinstance(part, AudioPart)
    return part.codes_TC


def text(conversation: Conversation, turn: int) -> str:
    part = conversation.turns[turn].parts[0]
    assert isinstance(part, TextPart)
    return part.text


def encoded_rows(conversation: Conversation) -> int:
    """Number of rows that `encode_conversation` gives, at one id per letter."""
    return encode_conversation(conversation, LETTERWISE).num_rows
