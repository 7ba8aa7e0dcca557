"""Turn rows into conversations: what each task shows the model and which turn is its target."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from higgs_tune.config import DataSettings
from higgs_tune.data.conversation import AudioPart, Conversation, Role, TextPart, Turn
from higgs_tune.data.shards import Row

TextLength = Callable[[str], int]


def transcribe(row: Row, *, audio_of: Row | None = None) -> Conversation:
    """Audio, then its text. With `audio_of`, another clip's audio before the text of `row`."""
    source, key = (row, "") if audio_of is None else (audio_of, f":audio={audio_of.id}")
    turns = (
        Turn("user", (AudioPart(source.codes[0]),)),
        Turn("assistant", (TextPart(row.text),), target=True),
    )
    return Conversation(f"{row.id}:transcribe{key}", "transcribe", turns)


def speak(row: Row) -> Conversation:
    """Text, then its audio."""
    turns = (
        Turn("user", (TextPart(row.text),)),
        Turn("assistant", (AudioPart(row.codes[0]),), target=True),
    )
    return Conversation(f"{row.id}:speak", "speak", turns)


def clone(row: Row, reference: Row | None) -> Conversation:
    """Reference text and audio, then the target's text and audio.

    The reference is the row's own if it has one, else the clip `reference`. If its codes equal the target's
    (a recording listed twice), this is `speak` instead: the prompt would contain the target.
    """
    if row.ref_text is not None:
        key, ref_text, ref_codes_TC = f"{row.id}:clone", row.ref_text, row.codes[1]
    else:
        assert reference is not None, row.id
        key, ref_text = f"{row.id}:clone:ref={reference.id}", reference.text
        ref_codes_TC = reference.codes[0]
    if np.array_equal(ref_codes_TC, row.codes[0]):
        return speak(row)
    turns = (
        Turn("user", (TextPart(ref_text),)),
        Turn("assistant", (AudioPart(ref_codes_TC),)),
        Turn("user", (TextPart(row.text),)),
        Turn("assistant", (AudioPart(row.codes[0]),), target=True),
    )
    return Conversation(key, "clone", turns)


def chat(row: Row) -> Conversation:
    """The row's own turns; the assistant's from `start_index` on are targets."""
    assert row.turns is not None, row.id
    turns = []
    for index, raw in enumerate(json.loads(row.turns)):
        role: Role = raw["role"]
        parts = tuple(
            TextPart(part["text"])
            if part["type"] == "text"
            else AudioPart(row.codes[part["audio"]])
            for part in raw["parts"]
        )
        turns.append(Turn(role, parts, target=role == "assistant" and index >= row.start_index))
    return Conversation(f"{row.id}:chat", "chat", tuple(turns))


def with_system_turn(talk: Conversation, system_text: str | None) -> Conversation:
    """Put a system turn before a spoken clip, if there is a text for one.

    A chat keeps its own turns. Transcription gets none, because the published base's text asks for speech.
    """
    if system_text is None or talk.task not in ("speak", "clone"):
        return talk
    return replace(talk, turns=(Turn("system", (TextPart(system_text),)), *talk.turns))


def texts_of(text: str, turns: str | None, ref_text: str | None = None) -> list[str]:
    """The text parts of a row, with a clip's reference text if that is given."""
    if turns is None:
        return [text] if ref_text is None else [text, ref_text]
    parts = [part for turn in json.loads(turns) for part in turn["parts"]]
    return [part["text"] for part in parts if part["type"] == "text"]


_ROWS_PER_TURN = 8  # header, role, line break and end of turn are 5 with a Llama-3 tokenizer


def most_rows(
    num_frames: Iterable[int], text_lengths: Iterable[int], num_turns: int, num_codebooks: int
) -> int:
    """Upper bound on the rows that `encode_conversation` makes of these parts.

    T frames take T + C + 3 rows, including their delay and the two control tokens around them.
    """
    audio = sum(frames + num_codebooks + 3 for frames in num_frames)
    return 1 + _ROWS_PER_TURN * num_turns + audio + sum(text_lengths)


def system_rows(system_text: str | None, text_length: TextLength = len) -> int:
    """Upper bound on the rows that `with_system_turn` adds, in the unit of `text_length`."""
    return 0 if system_text is None else _ROWS_PER_TURN + text_length(system_text)


def longest_conversation(
    data: DataSettings, num_codebooks: int, positions: int, text_length: TextLength = len
) -> int:
    """The longest conversation to use, in rows: `data.max_rows`, but at most the base's positions.

    By default it is what cloning the longest clip from another may take.
    """
    clip = most_rows([data.max_frames], [data.max_text_tokens], 2, num_codebooks)
    default = 2 * clip + system_rows(data.system_text, text_length)
    return min(data.max_rows or default, positions)


CLIP_TASKS = ("transcribe", "speak", "clone")
