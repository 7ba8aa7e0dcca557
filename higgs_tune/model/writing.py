"""Greedy text generation with the text head; stock `generate` only makes audio codes.

A prompt is the training sequence of the same task, cut off where the model continues, so there is only one
format. Shape letters: L rows, A audio rows, C codebooks, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data.tokens import IGNORE, Encoded, Vocabulary


@dataclass(frozen=True, eq=False)
class Prompt:
    """The model's input: ids, and the delayed codes of its audio rows."""

    key: str
    ids_L: np.ndarray
    codes_AC: np.ndarray


@dataclass(frozen=True)
class GeneratedText:
    """A generated text."""

    ids: tuple[int, ...]
    reached_end: bool  # False: cut off at `max_tokens`


def prompt_before_text(encoded: Encoded) -> Prompt:
    """Everything before the target's first text token."""
    stop = int(np.flatnonzero(encoded.text_labels_L != IGNORE)[0]) + 1
    num_audio = int((encoded.audio_rows_A < stop).sum())
    return Prompt(encoded.key, encoded.ids_L[:stop], encoded.codes_AC[:num_audio])


@torch.inference_mode()
def write_text(
    model: HiggsAudioV2ForConditionalGeneration,
    vocabulary: Vocabulary,
    prompt: Prompt,
    max_tokens: int,
) -> GeneratedText:
    """Continue a prompt greedily with text, up to `<|eot_id|>` or `max_tokens`.

    No other control token is ever written.

    Args:
        model: with its text head: stock or with cross-attention modules, and with any adapters attached.
    """
    head: Any = model.text_lm_head
    end, device = vocabulary.end_of_turn, head.weight.device
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
        output = model.model(input_ids=fed, cache=cache, use_cache=True, **audio)
        logits_V = head(output.last_hidden_state[0, -1]).float()
        logits_V[never] = -torch.inf
        token = int(logits_V.argmax())
        if token == end:
            return GeneratedText(tuple(written), reached_end=True)
        written.append(token)
        cache, fed, audio = output.cache, torch.tensor([[token]], device=device), {}
    return GeneratedText(tuple(written), reached_end=False)
