"""A training example before tokenising: turns of text and audio, and which of them are targets."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Role = Literal["system", "user", "assistant"]
Task = Literal["transcribe", "speak", "clone", "chat"]


@dataclass(frozen=True)
class TextPart:
    """Text as a person wrote it, without control tokens."""

    text: str


@dataclass(frozen=True, eq=False)
class AudioPart:
    """Codes of one unpadded clip, shape (T frames, C codebooks), without BOS/EOS and without delay."""

    codes_TC: np.ndarray


@dataclass(frozen=True)
class Turn:
    """One message. Only parts of a `target` turn (always the assistant's) carry labels."""

    role: Role
    parts: tuple[TextPart | AudioPart, ...]
    target: bool = False


@dataclass(frozen=True)
class Conversation:
    """One example. `key` names its row and task, so that equal keys mean equal content."""

    key: str
    task: Task
    turns: tuple[Turn, ...]
