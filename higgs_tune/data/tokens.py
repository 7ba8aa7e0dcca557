"""Tokenise a conversation into ids, delayed codes, and labels that are shifted exactly once.

The sequence is Llama-3's: a header before each turn, `<|eot_id|>` after it, and for each clip
`<|audio_out_bos|>`, one row per delayed frame, `<|audio_eos|>`. T codec frames become T + C + 1 rows
(C codebooks): a BOS column, the codes, an EOS column, codebook k delayed by k rows.

Shape letters: L rows of the sequence, A audio rows among them, C codebooks.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from higgs_tune.data.conversation import AudioPart, Conversation, TextPart
from higgs_tune.errors import DataError

IGNORE = -100
_NUM_SHOWN = 10  # unknown characters in an error
CONTROL_TOKENS = {
    "begin_of_text": "<|begin_of_text|>",
    "start_header": "<|start_header_id|>",
    "end_header": "<|end_header_id|>",
    "end_of_turn": "<|eot_id|>",
    "audio_bos": "<|audio_out_bos|>",
    "audio_eos": "<|audio_eos|>",
    "audio": "<|AUDIO_OUT|>",
    "audio_delay": "<|reserved_special_token_6|>",
}
"""Fields of `Vocabulary` → the token's name in every tokenizer of this model."""
AUDIO_IN_BOS = "<|audio_bos|>"  # in the published checkpoint's tokenizer, not in the embedded one


@dataclass(frozen=True)
class Vocabulary:
    """The control tokens and code ids of one checkpoint."""

    begin_of_text: int
    start_header: int
    end_header: int
    end_of_turn: int
    audio_bos: int
    audio_eos: int
    audio: int  # placeholder of a frame row
    audio_delay: int  # placeholder of the last C - 1 rows of a clip
    stream_bos: int
    stream_eos: int
    num_codebooks: int
    encode_text: Callable[[str], Sequence[int]]  # without special tokens
    audio_in_bos: int | None = None  # before a user's audio; None means `audio_bos`
    unknown: int | None = None  # id for characters without a token, if the tokenizer has one

    @property
    def control_ids(self) -> dict[int, str]:
        """Id → name of the control tokens."""
        ids = {getattr(self, name): token for name, token in CONTROL_TOKENS.items()}
        return ids if self.audio_in_bos is None else {**ids, self.audio_in_bos: AUDIO_IN_BOS}


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tokenised conversation; each label is at the row whose logits predict it.

    `text_labels_L[p]` is the id at row p + 1, `audio_labels_AC[a]` the codes of audio row a + 1 of the
    same clip, or IGNORE where there is no target.
    """

    key: str
    ids_L: np.ndarray  # int64, placeholders at audio rows
    audio_rows_A: np.ndarray  # int64, positions of the audio rows
    codes_AC: np.ndarray  # int64, delayed, with BOS and EOS
    text_labels_L: np.ndarray  # int64
    audio_labels_AC: np.ndarray  # int64

    @property
    def num_rows(self) -> int:
        """Rows of the sequence, audio and text."""
        return len(self.ids_L)


def delay_codes(codes_TC: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Lay codes out for the model: (T, C) → (T + C + 1, C), codebook k delayed by k rows.

    Source: HiggsAudioV2Processor.build_delay_pattern, transformers 5.24.
    """
    num_frames, num_codebooks = codes_TC.shape
    delayed_AC = np.full((num_frames + num_codebooks + 1, num_codebooks), eos, dtype=np.int64)
    for codebook in range(num_codebooks):
        delayed_AC[: codebook + 1, codebook] = bos
        delayed_AC[codebook + 1 : codebook + 1 + num_frames, codebook] = codes_TC[:, codebook]
    return delayed_AC


def undelay_codes(delayed_AC: np.ndarray, eos: int) -> np.ndarray:
    """Invert `delay_codes`, also for a clip that was cut off before its EOS: (A, C) → (T, C).

    The clip ends before the first frame in which any codebook holds EOS.
    """
    num_rows, num_codebooks = delayed_AC.shape
    num_frames = max(0, num_rows - num_codebooks)
    codes_TC = np.stack(
        [delayed_AC[k + 1 : k + 1 + num_frames, k] for k in range(num_codebooks)], axis=1
    )
    ended = np.flatnonzero((codes_TC == eos).any(axis=1))
    return codes_TC[: ended[0]] if len(ended) else codes_TC


def _clip_labels(delayed_AC: np.ndarray, num_frames: int) -> np.ndarray:
    """The next row's codes; BOS and the fill after each codebook's first EOS are ignored."""
    num_codebooks = delayed_AC.shape[1]
    labels_AC = np.full_like(delayed_AC, IGNORE)
    for codebook in range(num_codebooks):
        first, eos_row = codebook + 1, codebook + 1 + num_frames
        labels_AC[first - 1 : eos_row, codebook] = delayed_AC[first : eos_row + 1, codebook]
    return labels_AC


def encode_conversation(conversation: Conversation, vocabulary: Vocabulary) -> Encoded:
    """Tokenise one conversation.

    The labels of a target turn are its text up to and including `<|eot_id|>`, and in its audio each
    codebook from its first code to its one EOS. Headers, control tokens around audio, and every other
    turn carry no label.

    Raises:
        DataError: codes with another number of codebooks or outside the codebook, a control token inside
            a text, a character without a token, or no target.
    """
    voc = vocabulary
    ids: list[int] = [voc.begin_of_text]
    text_target_rows: list[int] = []  # rows whose own id is a target
    audio_rows: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    audio_labels: list[np.ndarray] = []
    newline = list(voc.encode_text("\n\n"))
    for turn in conversation.turns:
        ids += [voc.start_header, *voc.encode_text(turn.role), voc.end_header, *newline]
        for part in turn.parts:
            if isinstance(part, TextPart):
                text_ids = _text_ids(part, conversation.key, voc)
                if turn.target:
                    text_target_rows += range(len(ids), len(ids) + len(text_ids))
                ids += text_ids
            else:
                delayed_AC = _delayed_part(part, conversation.key, voc)
                num_rows = len(delayed_AC)
                num_delay = voc.num_codebooks - 1
                heard_bos = voc.audio_in_bos if turn.role == "user" else None
                ids.append(voc.audio_bos if heard_bos is None else heard_bos)
                audio_rows.append(np.arange(len(ids), len(ids) + num_rows))
                ids += [voc.audio] * (num_rows - num_delay) + [voc.audio_delay] * num_delay
                ids.append(voc.audio_eos)
                codes.append(delayed_AC)
                labels_AC = _clip_labels(delayed_AC, len(part.codes_TC))
                audio_labels.append(labels_AC if turn.target else np.full_like(labels_AC, IGNORE))
        if turn.target and isinstance(turn.parts[-1], TextPart):
            text_target_rows.append(len(ids))
        ids.append(voc.end_of_turn)

    ids_L = np.asarray(ids, dtype=np.int64)
    text_labels_L = np.full(len(ids_L), IGNORE, dtype=np.int64)
    targets = np.asarray(text_target_rows, dtype=np.int64)
    text_labels_L[targets - 1] = ids_L[targets]
    empty = np.zeros((0, voc.num_codebooks), dtype=np.int64)
    encoded = Encoded(
        key=conversation.key,
        ids_L=ids_L,
        audio_rows_A=np.concatenate(audio_rows) if audio_rows else np.zeros(0, dtype=np.int64),
        codes_AC=np.concatenate(codes) if codes else empty,
        text_labels_L=text_labels_L,
        audio_labels_AC=np.concatenate(audio_labels) if audio_labels else empty,
    )
    if len(targets) == 0 and not (encoded.audio_labels_AC != IGNORE).any():
        raise DataError(
            f"{conversation.key}: no assistant turn to learn from. "
            "Give the row an assistant turn, or a start_index that is not after it."
        )
    return encoded


def unknown_in(text: str, vocabulary: Vocabulary) -> list[str]:
    """Return the characters of a text that the vocabulary has no token for."""
    unknown, encode = vocabulary.unknown, vocabulary.encode_text
    if unknown is None or unknown not in encode(text):
        return []
    characters = sorted(set(unicodedata.normalize("NFC", text)))
    return [one for one in characters if unknown in encode(one)] or [text]


def unknown_problem(characters: Sequence[str]) -> str:
    """Return a message about characters that have no token, and what to do about them."""
    shown = ", ".join(
        f"{one!r} (U+{ord(one):04X})" if len(one) == 1 else repr(one)
        for one in characters[:_NUM_SHOWN]
    )
    more = f" and {len(characters) - _NUM_SHOWN} more" if len(characters) > _NUM_SHOWN else ""
    return (
        f"the base's tokenizer has no token for {shown}{more}; it reads all such characters as one. "
        "Write the texts without them (and prepare the data again), or use a base whose tokenizer knows "
        "them. docs/reference/embedded.md lists what the embedded one knows."
    )


def _text_ids(part: TextPart, key: str, voc: Vocabulary) -> list[int]:
    ids = list(voc.encode_text(part.text))
    known = voc.control_ids
    control = sorted({known[i] for i in ids if i in known})
    if control:
        raise DataError(
            f"{key}: a text holds the control token {control[0]}, which would break its sequence. "
            "Remove it from the text and prepare the data again."
        )
    if voc.unknown in ids:
        raise DataError(f"{key}: {unknown_problem(unknown_in(part.text, voc))}")
    return ids


def _delayed_part(part: AudioPart, key: str, voc: Vocabulary) -> np.ndarray:
    codes_TC = part.codes_TC
    if codes_TC.ndim != 2 or codes_TC.shape[1] != voc.num_codebooks or len(codes_TC) == 0:
        raise DataError(
            f"{key}: codes have shape {tuple(codes_TC.shape)}, needed (frames ≥ 1, "
            f"{voc.num_codebooks}). Prepare the data with the codec of this base."
        )
    if int(codes_TC.max()) >= min(voc.stream_bos, voc.stream_eos):
        raise DataError(
            f"{key}: code {int(codes_TC.max())} is outside the base's codebook of "
            f"{min(voc.stream_bos, voc.stream_eos)}. Prepare the data with the codec of this base."
        )
    return delay_codes(codes_TC.astype(np.int64), voc.stream_bos, voc.stream_eos)
