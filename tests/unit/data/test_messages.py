"""Every common shape of ChatML becomes turns, or a clip if it only wraps one."""

import json
from pathlib import Path
from typing import Any

import pytest

from higgs_tune.data.messages import target_content
from higgs_tune.data.tasks import texts_of
from tests.unit.data.manifests import (
    SPOKEN,
    SPOKEN_BEFORE,
    chat,
    jsonl,
    read_manifest,
    reason,
)


@pytest.mark.parametrize(
    "content",
    [
        "hello",
        {"type": "text", "text": "hello"},
        [{"type": "text", "text": "hello"}],
        ["hello"],
    ],
)
def test_every_shape_of_text_content_is_read(tmp_path: Path, content: Any):
    (row,) = jsonl(tmp_path, chat(("user", content), SPOKEN)).rows
    assert row.kind == "chat"
    assert row.turns is not None
    assert json.loads(row.turns) == [
        {"role": "user", "parts": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "parts": [{"type": "audio", "audio": 0}]},
    ]
    assert (row.text, row.audio, row.start_index) == ("hello", ("a.wav",), 1)


def test_joined_texts_of_an_answer_keep_the_spaces_between_them(tmp_path: Path):
    pieces = [" good", {"type": "text", "text": " morning"}, " al", "l\n"]
    answer = [*pieces, SPOKEN[1], " Bye ", " now"]
    row = chat(("user", pieces), ("assistant", answer))
    (found,) = jsonl(tmp_path, row).rows
    assert texts_of(found.text, found.turns) == [
        *("good", "morning", "al", "l"),  # the native template trims each text of a user
        *("good morning all", "Bye  now"),
    ]
    pieces = [{"type": "text", "text": "e"}, "\u0301t\u00e9", {"type": "text", "text": None}]
    assert "without text" in reason(jsonl(tmp_path, chat(("user", "x"), ("assistant", pieces))))
    (found,) = jsonl(tmp_path, chat(("user", [SPOKEN[1]]), ("assistant", pieces[:2]))).rows
    assert found.text == "\u00e9t\u00e9"


def turns_of(tmp_path: Path, row: dict[str, Any]) -> tuple[list[Any], int]:
    """Each turn as its role and parts (a text or an audio's number), and the first turn to learn."""
    (found,) = jsonl(tmp_path, row).rows
    assert found.turns is not None
    turns = [
        (turn["role"], *(part.get("text", part.get("audio")) for part in turn["parts"]))
        for turn in json.loads(found.turns)
    ]
    return turns, found.start_index


SCENE = "<|scene_desc_start|>\n{}\n<|scene_desc_end|>"


@pytest.mark.parametrize(
    "before, system",
    [
        ([("system", " Speak. "), ("scene", " A quiet room. ")], f"Speak.\n\n{SCENE}"),
        ([("scene", ["A quiet room."])], SCENE),
        ([("system", ""), ("scene", {"type": "text", "text": "A quiet room."})], SCENE),
    ],
)
def test_a_scene_becomes_part_of_the_system_turn(tmp_path: Path, before: list[Any], system: str):
    """As the native chat template writes it (convert_higgs_audio_v2_to_hf.py of transformers)."""
    talk = [("user", "one"), SPOKEN_BEFORE, ("user", "two"), SPOKEN]
    first = ("system", system.format("A quiet room."))
    wanted = [first, ("user", "one"), ("assistant", 0), ("user", "two"), ("assistant", 1)]
    assert turns_of(tmp_path, chat(*before, *talk)) == (wanted, 4)
    for number in range(len(before) + len(talk)):
        found = turns_of(tmp_path, chat(*before, *talk, start_index=number))
        assert found == (wanted, max(0, number - len(before) + 1) if number else 0)


def test_a_scene_may_describe_speakers_by_texts_and_recordings(tmp_path: Path):
    audio = SPOKEN_BEFORE[1]
    start, end = SCENE.split("{}")

    def scene(*parts: Any) -> tuple[Any, ...]:
        row = chat(("system", "Speak."), ("scene", list(parts)), ("user", "x"), SPOKEN)
        return turns_of(tmp_path, row)[0][0][1:]

    start = "Speak.\n\n" + start
    assert scene("Quiet.", "A:", audio, "B:", audio) == (
        *(f"{start}Quiet.\n\nA: ", 0, "\nB: ", 1, end),
    )
    assert scene("Quiet.", "A: low", "B: high", "C") == (
        f"{start}Quiet.\n\nA: low\nB: high\nC{end}",
    )
    assert scene(audio, audio, "both") == (f"{start} ", 0, "\n ", 1, f"\nboth{end}")
    assert scene("A:", audio) == (f"{start}A:\n\n ", 0, end)


@pytest.mark.parametrize("content", ["", " ", [], [{"type": "text", "text": ""}], ["", "\ufeff"]])
def test_an_empty_system_message_is_left_out(tmp_path: Path, content: Any):
    row = chat(("system", content), ("user", "x"), SPOKEN)
    for start in ({}, {"start_index": 1}, {"start_index": 2}):
        turns, first = turns_of(tmp_path, row | start)
        assert turns == [("user", "x"), ("assistant", 0)]
        assert first == start.get("start_index", 2) - 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "audio", "audio_url": "a b.wav"},
        {"type": "audio", "audio": "a b.wav"},
        {"type": "audio", "path": "a b.wav"},
        {"type": "audio", "audio": {"path": "a b.wav"}},
        {"type": "audio_url", "audio_url": {"url": "file://a%20b.wav"}},
        {"type": "audio", "audio_url": "a b.wav", "raw_audio": None, "duration": None},
    ],
)
def test_every_shape_of_audio_part_is_read(tmp_path: Path, part: dict[str, Any]):
    (row,) = jsonl(tmp_path, chat(("user", [part]), ("assistant", "it says so"))).rows
    assert (row.audio, row.text) == (("a b.wav",), "it says so")


def test_audio_placeholders_take_their_paths_from_audios(tmp_path: Path):
    messages = [("user", "<audio>Repeat: <audio>"), ("assistant", "<audio>")]
    (row,) = jsonl(tmp_path, chat(*messages, audios=["a.wav", "b.wav", "c.wav"])).rows
    assert row.turns is not None
    parts = [part for turn in json.loads(row.turns) for part in turn["parts"]]
    assert [part.get("text", part.get("audio")) for part in parts] == [0, "Repeat:", 1, 2]
    assert row.audio == ("a.wav", "b.wav", "c.wav")


def test_only_the_last_answer_is_learnt_unless_start_index_says_otherwise(tmp_path: Path):
    messages = [("user", "ref"), SPOKEN_BEFORE, ("user", "say this"), SPOKEN]
    first, second = jsonl(tmp_path, chat(*messages), chat(*messages, start_index=0)).rows
    assert (first.start_index, second.start_index) == (3, 0)
    assert first.text == "say this"
    heard = ("user", [SPOKEN[1]])
    messages = [heard, ("assistant", "one"), heard, ("assistant", "two")]
    first, second = jsonl(tmp_path, chat(*messages), chat(*messages, start_index=0)).rows
    assert (first.text, second.text) == ("two", "one\ntwo")


@pytest.mark.parametrize(
    "start, texts, recordings", [(5, "d", "3"), (3, "cd", "23"), (1, "bcd", "23")]
)
def test_a_chat_teaches_the_learnt_answers_and_what_they_answer(
    tmp_path: Path, start: int, texts: str, recordings: str
):
    first, second, third = ({"type": "audio", "path": number} for number in "123")
    asked, told = [("user", "a"), ("user", ["c", first]), ("user", [third])], ["b", second, "d"]
    messages = [
        one for ask, tell in zip(asked, told, strict=True) for one in (ask, ("assistant", tell))
    ]
    (row,) = jsonl(tmp_path, chat(*messages, start_index=start)).rows
    said, heard = target_content(row)
    assert (set(said) - {row.text}, set(heard)) == (set(texts) - {row.text}, set(recordings))


@pytest.mark.parametrize("system", [[], [("system", "Generate audio.")]])
def test_chats_that_only_wrap_a_recording_become_clips(tmp_path: Path, system: list[Any]):
    def audio(name: str) -> dict[str, str]:
        return {"type": "audio", "audio_url": name}

    rows = [
        chat(*system, ("user", "say"), ("assistant", audio("a.wav"))),
        chat(*system, ("user", audio("b.wav")), ("assistant", "said")),
        chat(
            *system,
            *(("user", "ref"), ("assistant", audio("r.wav"))),
            *(("user", "say"), ("assistant", audio("c.wav"))),
        ),
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_manifest(path, tmp_path, 2000, clips_from_chat=True).rows
    assert {row.kind for row in found} == {"clip"}
    assert [row.text for row in found] == ["say", "said", "say"]
    assert [row.audio for row in found] == [("a.wav",), ("b.wav",), ("c.wav", "r.wav")]
    assert [row.ref_text for row in found] == [None, None, "ref"]
    assert {row.kind for row in read_manifest(path, tmp_path, 2000).rows} == {"chat"}


@pytest.mark.parametrize(
    "row",
    [
        chat(("user", ["Who?", SPOKEN[1]]), ("assistant", "Anna")),
        chat(("user", "hi"), SPOKEN_BEFORE, ("user", "and"), SPOKEN, start_index=0),
        chat(("system", ["voice", SPOKEN_BEFORE[1]]), ("user", "say"), SPOKEN),
        chat(("user", "say"), ("assistant", ["Sure.", SPOKEN[1]])),
    ],
)
def test_chats_that_are_more_than_a_clip_stay_chats(tmp_path: Path, row: dict[str, Any]):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_manifest(path, tmp_path, 2000, clips_from_chat=True).rows
    assert found.kind == "chat"


def test_a_start_index_that_pandas_wrote_as_a_float_is_read(tmp_path: Path):
    first, missing = (chat(("user", "say"), SPOKEN, start_index=at) for at in (1.0, float("nan")))
    assert [row.start_index for row in jsonl(tmp_path, first, missing).rows] == [1, 1]
    assert "start_index is 0.5" in reason(jsonl(tmp_path, first | {"start_index": 0.5}))
