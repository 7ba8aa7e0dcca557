"""Read ChatML rows: messages of text and audio parts, in the forms that are in use."""

import json
from collections.abc import Mapping
from dataclasses import replace
from os.path import normpath
from pathlib import Path
from typing import Any

from higgs_tune.data.rows import (
    ManifestRow,
    audio_path,
    field,
    is_blank,
    refuse_segment,
    text_field,
)
from higgs_tune.errors import DataError

ROLES = ("system", "user", "assistant", "scene")
_PLACEHOLDER = "<audio>"
_AUDIO_KEYS = ("audio_url", "audio", "path", "url", "file")
_RAW_KEYS = ("raw_audio", "input_audio", "bytes")


def chat_row(fields: Mapping[str, Any], identity: Mapping[str, Any]) -> ManifestRow:
    """Build a chat row from `messages`.

    `start_index` is the first message that may be a target; without it only the last assistant message is
    one, so that reference audio in an earlier message stays a prompt.

    Raises:
        DataError: an unknown role or part, an empty message, no audio, or no target.
    """
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is not a list of messages")
    listed = fields.get("audios") or []
    if not isinstance(listed, list):
        raise DataError(f"audios is {type(listed).__name__}, needed a list of paths")
    queue = list(listed) if listed else None
    audio: list[str] = []
    turns, numbers = _turns(messages, audio, queue)
    if queue:
        raise DataError(f"audios has {len(queue)} more paths than messages have {_PLACEHOLDER}")
    if not audio:
        raise DataError("messages have no audio part")
    first_learnt = _start_index(fields.get("start_index"), messages)
    start = sum(number < first_learnt for number in numbers)
    targets = [turn for turn in turns[start:] if turn["role"] == "assistant" and turn["parts"]]
    if not targets:
        raise DataError(
            f"no assistant message from start_index {first_learnt} on: nothing to learn"
        )
    return ManifestRow(
        **identity,
        kind="chat",
        text=_target_text(turns, start),
        audio=tuple(audio),
        turns=json.dumps(turns, ensure_ascii=False),
        start_index=start,
    )


def _start_index(value: Any, messages: list[Any]) -> int:
    if value is None or value != value:  # NaN is pandas' missing number
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise DataError("messages have no assistant message: nothing to learn")
        return answers[-1]
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes integers floats in a column where one is missing
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(messages):
        raise DataError(f"start_index is {value!r}, needed a number from 0 to {len(messages) - 1}")
    return value


def _turns(
    messages: list[Any], audio: list[str], queue: list[Any] | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the turns, and for each the number of its message.

    An empty system message is dropped; a scene becomes part of the system turn.
    """
    turns: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(
                f"message {number} is {type(message).__name__}, needed role and content"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"message {number} has role {role!r}, needed one of {', '.join(ROLES)}")
        if role == "assistant" and isinstance(content, list):
            content = _join_texts(content)
        parts = _parts(content, number, audio, queue)
        blank = [part for part in parts if part["type"] == "text" and is_blank(part["text"])]
        if role == "system" and parts == blank:
            continue
        if not parts:
            raise DataError(f"message {number} is empty")
        if blank:
            raise DataError(f"message {number}: text is empty")
        if role == "scene":
            if number > 1 or (number == 1 and messages[0]["role"] != "system"):
                raise DataError(
                    f"message {number} has role 'scene', which must be the first message or follow a "
                    "system message that is the first: move it there"
                )
            system = [*turns.pop()["parts"], "\n\n"] if turns else []
            numbers.clear()
            role, parts = "system", _with_scene(system, parts)
        turns.append({"role": role, "parts": parts})
        numbers.append(number)
    return turns, numbers


def _with_scene(system: list[Any], scene: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the parts of a system turn with its scene, as the native chat template writes them.

    Source: CHAT_TEMPLATE of convert_higgs_audio_v2_to_hf.py, transformers 5.23.
    """
    pieces = [*system, "<|scene_desc_start|>\n"]
    for place, part in enumerate(scene):
        following = scene[place + 1]["type"] if place + 1 < len(scene) else None
        if part["type"] == "audio":
            pieces += [" ", part] + ["\n"] * (following is not None)
        elif place == 0:
            pieces += [part, "\n\n"] if following else [part]
        else:
            pieces += [part, "\n"] if following == "text" else [part]
    joined = _join_texts([*pieces, "\n<|scene_desc_end|>"])
    return [{"type": "text", "text": one} if isinstance(one, str) else one for one in joined]


def _join_texts(content: list[Any]) -> list[Any]:
    """Join consecutive texts, so that the spaces between them are trained.

    Used for assistant messages and scenes. In other messages each text is stripped, as in the native chat
    template.
    """
    joined: list[Any] = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        text = part.get("text") if is_text else part
        if isinstance(text, str) and joined and isinstance(joined[-1], str):
            joined[-1] += text
        else:
            joined.append(text if isinstance(text, str) else part)
    return joined


def _parts(
    content: Any, number: int, audio: list[str], queue: list[Any] | None
) -> list[dict[str, Any]]:
    """Return the parts of one message; paths are appended to `audio`, and parts hold their index in it."""
    if isinstance(content, str):
        return _text_parts(content, number, audio, queue)
    parts: list[dict[str, Any]] = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            parts += _text_parts(part, number, audio, queue)
        elif not isinstance(part, Mapping):
            raise DataError(f"message {number} has a {type(part).__name__}, needed text or parts")
        elif part.get("type") == "text":
            text = field(part, ("text",), keep_empty=True)
            if text is None:
                raise DataError(f"message {number} has a text part without text")
            parts += _text_parts(text, number, audio, queue)
        elif part.get("type") in ("audio", "audio_url"):
            refuse_segment(part)
            path = audio_path(part, _AUDIO_KEYS)
            if path is None:
                inside = any(part.get(key) for key in _RAW_KEYS)
                raise DataError(
                    f"message {number} has an audio part without a path"
                    + (": audio inside the manifest is not supported" if inside else "")
                )
            parts.append(_audio_part(path, audio))
        else:
            raise DataError(
                f"message {number} has a part of type {part.get('type')!r}, needed text or audio"
            )
    return parts


def _text_parts(
    text: str, number: int, audio: list[str], queue: list[Any] | None
) -> list[dict[str, Any]]:
    """Return a text as parts; if the row lists `audios`, each placeholder takes the next of them."""
    checked = text_field({"text": text}, ("text",), keep_empty=True) or ""
    if queue is None or _PLACEHOLDER not in checked:
        return [{"type": "text", "text": checked}]
    pieces = checked.split(_PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for place, piece in enumerate(pieces):
        if place:
            if not queue:
                raise DataError(f"message {number} has more {_PLACEHOLDER} than audios has paths")
            path = audio_path({"audios": queue.pop(0)}, ("audios",))
            if path is None:
                raise DataError("audios has an empty path")
            parts.append(_audio_part(path, audio))
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _audio_part(path: str, audio: list[str]) -> dict[str, Any]:
    audio.append(path)
    return {"type": "audio", "audio": len(audio) - 1}


def _target_text(turns: list[dict[str, Any]], start: int) -> str:
    """Return the targets' text; without one, the last text outside system turns, else the last, else ""."""

    def texts(some: list[dict[str, Any]]) -> list[str]:
        return [part["text"] for turn in some for part in turn["parts"] if part["type"] == "text"]

    learnt = texts([turn for turn in turns[start:] if turn["role"] == "assistant"])
    if learnt:
        return "\n".join(learnt)
    return (texts([t for t in turns if t["role"] != "system"]) or texts(turns) or [""])[-1]


def target_content(row: ManifestRow) -> tuple[list[str], list[str]]:
    """Return the texts and recordings that a chat row teaches.

    They are those of its target turns, and those that these answer: a target recording may read aloud the
    text that it answers, and a target text may transcribe the recording that it answers.
    """
    texts, recordings = [row.text], []
    asked_texts: list[str] = []
    asked_audio: list[str] = []
    for index, turn in enumerate(json.loads(row.turns or "[]")):
        said = [part["text"] for part in turn["parts"] if part["type"] == "text"]
        heard = [row.audio[part["audio"]] for part in turn["parts"] if part["type"] == "audio"]
        if turn["role"] == "user":
            asked_texts += said
            asked_audio += heard
        if turn["role"] == "assistant":
            if index >= row.start_index:
                texts += said + (asked_texts if heard else [])
                recordings += heard + (asked_audio if said else [])
            asked_texts, asked_audio = [], []
    return texts, recordings


def repeated_target(row: ManifestRow, data_root: Path) -> str | None:
    """Return the first target recording that appears earlier in the same chat, as prompt or target."""
    before: set[str] = set()
    for index, turn in enumerate(json.loads(row.turns or "[]")):
        for part in turn["parts"]:
            if part["type"] == "audio":
                name = row.audio[part["audio"]]
                path = normpath(data_root / name)
                if path in before and turn["role"] == "assistant" and index >= row.start_index:
                    return name
                before.add(path)
    return None


_READ_ALOUD = (("user", "text"), ("assistant", "audio"))
_WRITTEN_DOWN = (("user", "audio"), ("assistant", "text"))


def clip_from_chat(row: ManifestRow) -> ManifestRow:
    """Return the clip that a chat row wraps, or the row itself if it is more than that.

    A clip is a text read aloud, a transcribed recording, or a text read aloud after a reference (text,
    audio) by the same voice. System text is dropped.
    """
    turns = json.loads(row.turns or "[]")
    first = int(turns[0]["role"] == "system" and _types(turns[0]) == ["text"])
    body = turns[first:]
    if any(len(turn["parts"]) != 1 for turn in body):
        return row
    shape = tuple((turn["role"], _types(turn)[0]) for turn in body)
    parts = [turn["parts"][0] for turn in body]
    if shape in (_READ_ALOUD, _WRITTEN_DOWN):
        audio, ref_text = row.audio, None
    elif shape == 2 * _READ_ALOUD and row.start_index > first + 1:
        audio, ref_text = (row.audio[1], row.audio[0]), parts[0]["text"]
    else:
        return row
    text = next(part["text"] for part in reversed(parts) if part["type"] == "text")
    return replace(
        row, kind="clip", text=text, audio=audio, ref_text=ref_text, turns=None, start_index=0
    )


def _types(turn: Mapping[str, Any]) -> list[str]:
    return [part["type"] for part in turn["parts"]]
