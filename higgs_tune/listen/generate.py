"""Speech and text from a prompt: the stock model's `generate`, and greedy text from its text head.

A prompt is the training sequence of the same task, cut off where the model takes over, so there is
no second format. Shape letters: B prompts of a batch, L rows of the longest one, A audio rows of the
longest reference, T frames, C codebooks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data.tokens import IGNORE, Encoded, Vocabulary, undelay_codes
from higgs_tune.errors import DataError
from higgs_tune.listen.options import SpeechOptions


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model is given: ids, and the delayed codes of the audio among them."""

    key: str
    ids_L: np.ndarray
    codes_AC: np.ndarray


@dataclass(frozen=True, eq=False)
class Spoken:
    """One generated clip."""

    codes_TC: np.ndarray  # uint16, without delay, BOS and EOS; T may be 0
    reached_eos: bool  # False: cut off at the length limit
    num_clipped: int  # BOS codes amid speech, set to the last code as the stock processor does


@dataclass(frozen=True)
class Written:
    """A generated text."""

    ids: tuple[int, ...]
    reached_end: bool


def prompt_before_audio(encoded: Encoded) -> Prompt:
    """Everything up to the target's `<|audio_out_bos|>`."""
    first = int(np.flatnonzero((encoded.audio_labels_AC != IGNORE).any(axis=1))[0])
    return Prompt(
        encoded.key, encoded.ids_L[: encoded.audio_rows_A[first]], encoded.codes_AC[:first]
    )


def prompt_before_text(encoded: Encoded) -> Prompt:
    """Everything up to the target's first text token."""
    stop = int(np.flatnonzero(encoded.text_labels_L != IGNORE)[0]) + 1
    num_audio = int((encoded.audio_rows_A < stop).sum())
    return Prompt(encoded.key, encoded.ids_L[:stop], encoded.codes_AC[:num_audio])


def most_frames(num_positions: int, prompts: Sequence[Prompt], num_codebooks: int) -> int:
    """Frames for which the base has positions left after the longest prompt.

    Raises:
        DataError: not even one.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids_L))
    frames = num_positions - len(longest.ids_L) - num_codebooks - 1
    if frames < 1:
        raise DataError(
            f"{longest.key}: the prompt takes {len(longest.ids_L)} rows, the base can hold "
            f"{num_positions} with the speech that follows. Shorten the text or the reference."
        )
    return frames


def speak(
    model: HiggsAudioV2ForConditionalGeneration,
    vocabulary: Vocabulary,
    prompts: Sequence[Prompt],
    options: SpeechOptions,
    *,
    seed: int,
    max_frames: int,
) -> list[Spoken]:
    """Say each prompt's text; prompts of any length go through the model together.

    The global random state is left as it was. Draws depend on the seed and on which prompts share
    the batch; with temperature 0 the batch makes no difference but rounding.

    Raises:
        DataError: the prompts and `max_frames` do not fit the base's positions.
    """
    voc, device = vocabulary, model.device
    room = most_frames(model.config.max_position_embeddings, prompts, voc.num_codebooks)
    if max_frames > room:
        raise DataError(f"{max_frames} frames asked for, the base has room for {room}.")
    ids_BL, mask_BL, codes_BAC, codes_mask_BA = _left_padded(prompts, voc)
    reference: dict[str, Any] = {}
    if codes_BAC.shape[1]:
        reference = {
            "audio_input_ids": torch.from_numpy(codes_BAC).to(device),
            "audio_input_ids_mask": torch.from_numpy(codes_mask_BA).to(device),
        }
    stock: Any = model  # `generate` wants a protocol of transformers' own as self
    with torch.inference_mode(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        rows_BAC = stock.generate(
            input_ids=torch.from_numpy(ids_BL).to(device),
            attention_mask=torch.from_numpy(mask_BL).to(device),
            max_new_tokens=max_frames + voc.num_codebooks + 1,
            pad_token_id=voc.end_of_turn,
            return_dict_in_generate=False,
            **options.sampling(),
            **reference,
        )
    new_BAC = rows_BAC[:, codes_BAC.shape[1] :].cpu().numpy()
    return [_spoken(rows_AC, voc, max_frames) for rows_AC in new_BAC]


def _left_padded(
    prompts: Sequence[Prompt], voc: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids (B, L) and their mask, padded on the left; codes (B, A, C) and their mask, on the right."""
    batch = len(prompts)
    longest = max(len(prompt.ids_L) for prompt in prompts)
    most_audio = max(len(prompt.codes_AC) for prompt in prompts)
    ids_BL = np.full((batch, longest), voc.end_of_turn, dtype=np.int64)
    mask_BL = np.zeros((batch, longest), dtype=np.int64)
    # EOS: the repetition window of `generate` leaves it out of its count
    codes_BAC = np.full((batch, most_audio, voc.num_codebooks), voc.stream_eos, dtype=np.int64)
    codes_mask_BA = np.zeros((batch, most_audio), dtype=bool)
    for row, prompt in enumerate(prompts):
        ids_BL[row, longest - len(prompt.ids_L) :] = prompt.ids_L
        mask_BL[row, longest - len(prompt.ids_L) :] = 1
        codes_BAC[row, : len(prompt.codes_AC)] = prompt.codes_AC
        codes_mask_BA[row, : len(prompt.codes_AC)] = True
    return ids_BL, mask_BL, codes_BAC, codes_mask_BA


def _spoken(rows_AC: np.ndarray, voc: Vocabulary, max_frames: int) -> Spoken:
    codes_TC = undelay_codes(rows_AC, voc.stream_eos)[:max_frames]
    last = min(voc.stream_bos, voc.stream_eos) - 1
    return Spoken(
        np.minimum(codes_TC, last).astype(np.uint16),
        reached_eos=bool((rows_AC == voc.stream_eos).all(axis=1).any()),
        num_clipped=int((codes_TC > last).sum()),
    )


@torch.inference_mode()
def write_text(
    model: HiggsAudioV2ForConditionalGeneration,
    vocabulary: Vocabulary,
    prompt: Prompt,
    max_tokens: int,
) -> Written:
    """The likeliest text after a prompt, token by token, up to `<|eot_id|>` or `max_tokens`.

    No control token other than that one is ever written. Stock `generate` writes no text at all.
    """
    head: Any = model.text_lm_head
    end, device = vocabulary.end_of_turn, model.device
    never = torch.tensor(sorted(vocabulary.control_ids.keys() - {end}), device=device)
    fed = torch.from_numpy(prompt.ids_L)[None].to(device)
    audio: dict[str, Any] = {}
    if len(prompt.codes_AC):
        codes = torch.from_numpy(prompt.codes_AC)[None].to(device)
        mask = torch.ones(codes.shape[:2], dtype=torch.bool, device=device)
        audio = {"audio_input_ids": codes, "audio_input_ids_mask": mask}
    cache: Any = None
    written: list[int] = []
    while len(written) < max_tokens:
        output = model.model(input_ids=fed, past_key_values=cache, use_cache=True, **audio)
        logits = head(output.last_hidden_state[0, -1]).float()
        logits[never] = -torch.inf
        token = int(logits.argmax())
        if token == end:
            return Written(tuple(written), reached_end=True)
        written.append(token)
        cache, fed, audio = output.past_key_values, torch.tensor([[token]], device=device), {}
    return Written(tuple(written), reached_end=False)
