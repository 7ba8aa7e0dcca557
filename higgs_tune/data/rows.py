"""A checked row of a manifest, and how to read its fields under their usual names."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import unquote

from higgs_tune.data.plain_text import is_utf8, visible
from higgs_tune.data.tokens import AUDIO_IN_BOS, CONTROL_TOKENS
from higgs_tune.errors import DataError

# The first name is ours, the others are those of common trainers and toolkits.
ID = ("id", "utt_id", "uid")
PATH = (
    "path",
    "audio_file",
    "audio_path",
    "audio_filepath",
    "audio",
    "audio_url",
    "file",
    "file_name",
    "wav",
    "wav_filename",
)
TEXT = ("text", "transcript", "transcription", "sentence")
TEXT_FILE = ("transcript_file", "text_file")
SPEAKER = ("speaker", "speaker_id", "speaker_name", "client_id")
LANGUAGE = ("language", "lang", "locale")
SPLIT = ("split",)
REF_AUDIO = ("ref_audio_file", "ref_audio", "ref_path", "ref_audio_path")
REF_TEXT = ("ref_text", "ref_transcript")
SEGMENT = ("offset", "start", "start_time")
REF_TEXT_FILE = ("ref_transcript_file", "ref_text_file")
_ZERO = " 0.,:"  # the characters that a table may write a start of 0 with


@dataclass(frozen=True, slots=True)  # there may be millions
class ManifestRow:
    """One example of a manifest; the fields are those of `shards.Row`, with audio as paths."""

    number: int  # line of a JSONL, CSV or TSV file, else the position in the file from 1
    id: str
    split: str | None
    speaker: str
    language: str | None
    kind: Literal["clip", "chat"]
    text: str
    audio: tuple[str, ...]  # as written: relative to the data root, or absolute
    ref_text: str | None = None
    turns: str | None = None
    start_index: int = 0

    def canonical(self) -> str:
        """JSON of everything that determines what the row becomes."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Rejection:
    """A row that is not in the dataset, and why. One line of `rejected.jsonl`."""

    row: int
    id: str | None
    path: str | None
    reason: str


def field(
    fields: Mapping[str, Any], names: tuple[str, ...], *, keep_empty: bool = False
) -> str | None:
    """Return the value of the first of `names` that has one, as stripped text; blank counts as absent.

    Args:
        keep_empty: return "" instead of None if none has a value and at least one is blank.

    Raises:
        DataError: the value is not text, or UTF-8 cannot encode it.
    """
    found = None
    for name in names:
        value = fields.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # pandas makes integers floats in a column where one is missing
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids and speakers are often numbers
        if value is None or value != value:  # NaN is pandas' missing number
            continue
        if not isinstance(value, str):
            raise DataError(f"{name} is {type(value).__name__}, needed text")
        if not is_utf8(value):
            raise DataError(f"{name} has half a surrogate pair, which is not valid text")
        if value := value.strip():
            return value
        found = "" if keep_empty else None
    return found


def text_field(
    fields: Mapping[str, Any], names: tuple[str, ...], *, keep_empty: bool = False
) -> str | None:
    """Like `field`, in the form of `same_form`."""
    value = field(fields, names, keep_empty=keep_empty)
    return None if value is None else same_form(value)


def same_form(text: str) -> str:
    """A text in NFC, stripped, with line ends `\\n` and no byte order mark.

    So texts that look equal have equal tokens, whatever file they came from.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", lines.strip())


def audio_path(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return a local path, also from {"path": …}, {"url": …} and file:// addresses."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, Mapping):
            if value.get("bytes"):
                raise DataError(
                    f"{name}: audio inside the manifest is not supported: write its bytes to a file "
                    "below the data root and give that file's path, as `higgs-tune data unpack` does"
                )
            inner = audio_path(value, ("path", "url"))
            if inner is None:
                raise DataError(f"{name} holds no path: audio inside the manifest is not supported")
            return inner
        path = field(fields, (name,))
        if path is None:
            continue
        if path.startswith("file://"):
            return unquote(path.removeprefix("file://"))
        if "://" in path or path.startswith("data:"):
            raise DataError(f"{name} {path[:60]} is not a local file: download it first")
        return path
    return None


def refuse_segment(fields: Mapping[str, Any]) -> None:
    """Raise DataError if the fields select only a part of a recording, as NeMo's manifests can."""
    for name in SEGMENT:
        value = fields.get(name)
        if value is None or value != value:  # NaN is pandas' missing number
            continue
        if str(value).strip(_ZERO):
            raise DataError(
                f"{name} is {value!r}: only whole recordings are read, and this one would say more than "
                f"the text. Cut the recording into files, and leave {name} out"
            )


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    return not visible(text).strip()


def text_problem(text: str, max_chars: int) -> str | None:
    """Why a text cannot be used, or None."""
    if is_blank(text):
        return "text is empty"
    if len(text) > max_chars:
        return f"text has {len(text)} characters, limit is {max_chars} (max_text_chars)"
    for token in (*CONTROL_TOKENS.values(), AUDIO_IN_BOS):
        if token in text:
            return f"text holds the control token {token}: remove it"
    return None
