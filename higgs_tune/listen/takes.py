"""Speak one text in one or more takes: the prompt, the speech, and a WAV and a JSON file per take."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data import tasks
from higgs_tune.data.audio import read_clip
from higgs_tune.data.codec import Codec, decode_clip, encode_clip
from higgs_tune.data.plain_text import is_utf8
from higgs_tune.data.rows import same_form, text_problem
from higgs_tune.data.shards import Row
from higgs_tune.data.tokens import Vocabulary, encode_conversation, unknown_in
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.files import write_bytes, write_json, writing
from higgs_tune.listen.generate import most_frames, prompt_before_audio, speak
from higgs_tune.listen.options import WRITE_ADVICE, SpeechOptions
from higgs_tune.local_path import refuse_existing
from higgs_tune.model.writing import Prompt

_MAX_TEXT_CHARS = 2000  # the default limit of `data prepare`


@dataclass(frozen=True)
class Reference:
    """A recording of the voice to imitate, and its transcript."""

    path: Path
    text: str


def take_prompt(
    text: str,
    reference: Reference | None,
    codec: Codec,
    vocabulary: Vocabulary,
    system_text: str | None = None,
) -> Prompt:
    """The prompt of the training task `speak`, or of `clone` with a reference.

    Texts are in the same form as in training.

    Args:
        system_text: text of the system turn, as `data.system_text` in training.

    Raises:
        DataError: a text is empty, too long, not UTF-8, or contains a control token or characters that the
            base does not know; or the reference is not a usable recording.
    """
    spoken, ref_text = same_form(text), reference and same_form(reference.text)
    texts = {"--text": spoken, "--reference-text": ref_text, "--system-text": system_text}
    for what, value in texts.items():
        if value is None:
            continue
        if not is_utf8(value):
            raise DataError(
                f"{what}: is not UTF-8. Convert it, for example with `iconv -f CP1256 -t UTF-8`."
            )
        if problem := text_problem(value, _MAX_TEXT_CHARS):
            raise DataError(f"{what}: {problem}.")
        if unknown := unknown_in(value, vocabulary):
            raise DataError(
                f"{what}: the base's tokenizer has no token for {', '.join(map(repr, unknown))}. Leave "
                "that out, or give a --base whose tokenizer knows it. docs/reference/embedded.md lists "
                "what the embedded one knows."
            )
    unspoken_TC = np.zeros((1, vocabulary.num_codebooks), dtype=np.uint16)  # not in the prompt
    codes = (unspoken_TC,)
    if reference is not None:
        codes = (unspoken_TC, _reference_codes(reference.path, codec))
    row = Row("--text", "validation", "clip", "", spoken, codes, ref_text=ref_text)
    talk = tasks.speak(row) if reference is None else tasks.clone(row, None)
    talk = tasks.with_system_turn(talk, system_text)
    return prompt_before_audio(encode_conversation(talk, vocabulary))


def _reference_codes(path: Path, codec: Codec) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"--reference: {path} does not exist or is not a file.")
    try:
        wave, rate_hz = read_clip(
            path, min_seconds=0.1, max_seconds=60.0, target_rate_hz=codec.config.sample_rate
        )
    except DataError as error:
        raise DataError(f"--reference {path}: {error}.") from None
    return encode_clip(codec, wave, rate_hz)


def take_paths(out: Path, num_takes: int) -> list[Path]:
    """`out` itself, or out-1.wav, out-2.wav, … for several takes.

    Raises:
        ConfigError: `out` does not end in .wav, or a WAV or JSON file of these names already exists.
    """
    if out.suffix.lower() != ".wav":
        raise ConfigError(f"--out: found {out}, needed a file name that ends in .wav.")
    paths = [out]
    if num_takes > 1:
        paths = [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, num_takes + 1)]
    for path in paths:
        refuse_existing(path)
        refuse_existing(path.with_suffix(".json"))
    return paths


def frame_limit(
    model: HiggsAudioV2ForConditionalGeneration,
    prompts: list[Prompt],
    codec: Codec,
    max_seconds: float,
) -> int:
    """Frames in `max_seconds`, or fewer if the base has no positions for more."""
    asked = max(1, round(max_seconds * codec.config.sample_rate / codec.config.hop_length))
    config = model.config
    return min(asked, most_frames(config.max_position_embeddings, prompts, config.num_codebooks))


def seconds_of(codes_TC: np.ndarray, codec: Codec) -> float:
    """Duration of the speech that the codes encode."""
    return len(codes_TC) * codec.config.hop_length / codec.config.sample_rate


def wave_of(codes_TC: np.ndarray, codec: Codec) -> np.ndarray:
    """Codes decoded to a float32 wave, scaled down if it would exceed full scale; empty for no codes."""
    if not len(codes_TC):
        return np.zeros(0, dtype=np.float32)
    wave = decode_clip(codec, codes_TC)
    return wave / max(1.0, float(np.abs(wave).max()))


def write_wav(path: Path, wave: np.ndarray, rate_hz: int) -> None:
    """Write a 16-bit WAV, either completely or not at all.

    Raises:
        DataError: it cannot be written.
    """
    content = io.BytesIO()  # libsndfile would report a full disk only as "System error."
    soundfile.write(content, wave, rate_hz, format="WAV", subtype="PCM_16")
    with writing(path, WRITE_ADVICE):
        write_bytes(path, content.getvalue())


def make_take(
    model: HiggsAudioV2ForConditionalGeneration,
    vocabulary: Vocabulary,
    prompt: Prompt,
    codec: Codec,
    options: SpeechOptions,
    path: Path,
    *,
    seed: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Speak the prompt once, write `path` and a JSON file beside it, and return the JSON's content.

    The same seed, prompt and model give the same WAV.

    Args:
        facts: further entries of the JSON, such as text and adapter.
    """
    max_frames = frame_limit(model, [prompt], codec, options.max_seconds)
    (spoken,) = speak(model, vocabulary, [prompt], options, seed=seed, max_frames=max_frames)
    write_wav(path, wave_of(spoken.codes_TC, codec), codec.config.sample_rate)
    record = {
        "wav": path.name,
        **facts,
        **options.model_dump(mode="json"),
        "seed": seed,
        "seconds": seconds_of(spoken.codes_TC, codec),
        "limit_seconds": max_frames * codec.config.hop_length / codec.config.sample_rate,
        "reached_eos": spoken.reached_eos,
        "hit_length_limit": not spoken.reached_eos,
        "num_clipped_codes": spoken.num_clipped,
    }
    with writing(path.with_suffix(".json"), WRITE_ADVICE):
        write_json(path.with_suffix(".json"), record)
    return record
