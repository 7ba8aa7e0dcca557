"""Generate speech from prompts with the stock model's `generate`.

Shape letters: B prompts of a batch, L rows of the longest one, A audio rows of the longest reference,
T frames, C codebooks.
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
from higgs_tune.model.writing import Prompt


@dataclass(frozen=True, eq=False)
class Spoken:
    """One generated clip."""

    codes_TC: np.ndarray  # uint16, without delay, BOS and EOS; T may be 0
    reached_eos: bool  # False: cut off at the length limit
    num_clipped: int  # BOS codes within speech, clipped to the last code as in the stock processor


def prompt_before_audio(encoded: Encoded) -> Prompt:
    """The sequence up to and including the target's `<|audio_out_bos|>`."""
    first = int(np.flatnonzero((encoded.audio_labels_AC != IGNORE).any(axis=1))[0])
    return Prompt(
        encoded.key, encoded.ids_L[: encoded.audio_rows_A[first]], encoded.codes_AC[:first]
    )


def most_frames(num_positions: int, prompts: Sequence[Prompt], num_codebooks: int) -> int:
    """Number of frames that fit into the base's positions after the longest prompt.

    Raises:
        DataError: not even one fits.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.ids_L))
    frames = num_positions - len(longest.ids_L) - num_codebooks - 1
    if frames < 1:
        raise DataError(
            f"{longest.key}: the prompt takes {len(longest.ids_L)} rows, and the base can hold "
            f"{num_positions} for prompt and speech together. Shorten the text or the reference."
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
    """Speak each prompt's text; the prompts, of any length, form one batch.

    The global random state is restored. Samples depend on the seed and on which prompts share the
    batch; with temperature 0 the batch changes only rounding, unless the checkpoint's `ras_win_len`
    resamples repeated codes.

    Raises:
        DataError: the prompts and `max_frames` do not fit the base's positions.
    """
    voc, device = vocabulary, model.device
    room = most_frames(model.config.max_position_embeddings, prompts, voc.num_codebooks)
    if max_frames > room:
        raise DataError(f"found max_frames {max_frames}, but the base has positions for {room}.")
    ids_BL, mask_BL, codes_BAC, codes_mask_BA = _left_padded(prompts, voc)
    reference: dict[str, Any] = {}
    if codes_BAC.shape[1]:
        reference = {
            "audio_input_ids": torch.from_numpy(codes_BAC).to(device),
            "audio_input_ids_mask": torch.from_numpy(codes_mask_BA).to(device),
        }
    stock: Any = model  # `generate` types self as a protocol of transformers' own
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
    """Ids (B, L) and their mask, padded on the left; codes (B, A, C) and their mask, padded on the right."""
    batch = len(prompts)
    longest = max(len(prompt.ids_L) for prompt in prompts)
    most_audio = max(len(prompt.codes_AC) for prompt in prompts)
    ids_BL = np.full((batch, longest), voc.end_of_turn, dtype=np.int64)
    mask_BL = np.zeros((batch, longest), dtype=np.int64)
    # Pad with EOS: the repetition window of `generate` does not count it.
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
