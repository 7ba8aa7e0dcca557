"""What an adapter writes when it hears validation clips: text for people to look at.

Stock `generate` only makes audio codes, so text is taken greedily from the text head. V vocabulary.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data.conversation import Conversation, TextPart
from higgs_tune.data.tokens import IGNORE, Encoded, encode_conversation
from higgs_tune.model.load import Base
from higgs_tune.train.checkpoint import load_adapter


@dataclass(frozen=True)
class Sample:
    """A clip's text, and what was heard."""

    key: str
    target: str
    predicted: str
    ended: bool  # false: cut off at the longest length


def sample_predictions(
    base: Base, adapter: Path, clips: Sequence[Conversation], max_tokens: int
) -> list[Sample]:
    """Write down some `transcribe` clips with an adapter from disk; `base` is left as it was."""
    with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5.23 renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = load_adapter(base.model, adapter)
    try:
        return [_sample(base, model.get_base_model(), clip, max_tokens) for clip in clips]
    finally:
        model.unload()  # the base's own linears, which the adapter had wrapped


def _sample(base: Base, model: Any, clip: Conversation, max_tokens: int) -> Sample:
    target = "".join(
        part.text
        for turn in clip.turns
        if turn.target
        for part in turn.parts
        if isinstance(part, TextPart)
    )
    prompt = encode_conversation(clip, base.vocabulary)
    end = base.vocabulary.end_of_turn
    ids = greedy_text(model, prompt, max_tokens, end)
    ended = bool(ids) and ids[-1] == end
    predicted = base.tokenizer.decode(ids[:-1] if ended else ids)
    assert isinstance(predicted, str)
    return Sample(clip.key, target, predicted, ended)


@torch.no_grad()
def greedy_text(
    model: HiggsAudioV2ForConditionalGeneration, example: Encoded, max_tokens: int, end: int
) -> list[int]:
    """The likeliest next tokens after everything that stands before the example's first text target.

    Args:
        model: with its text head, stock or with cross-attention modules, adapters attached.
        max_tokens: how many at most.
        end: the id that ends the text; it is returned, too.
    """
    head = model.text_lm_head
    assert head is not None
    device = head.weight.device
    length = int(np.flatnonzero(example.text_labels_L != IGNORE)[0]) + 1
    num_audio = int((example.audio_rows_A < length).sum())
    ids = torch.from_numpy(example.ids_L[None, :length]).to(device)
    codes = torch.from_numpy(example.codes_AC[None, :num_audio]).to(device)
    audio = {
        "audio_input_ids": codes,
        "audio_input_ids_mask": torch.ones(codes.shape[:2], dtype=torch.bool, device=device),
    }
    # no text, and without codes no audio either
    placeholders = [model.config.audio_token_id, model.config.audio_delay_token_id]
    # cross-attention modules run on whole sequences only
    use_cache = getattr(model.config, "cross_attention", "off") == "off"
    cache, rows, inputs = None, ids, audio
    text: list[int] = []
    while len(text) < max_tokens:
        output = model.model(input_ids=rows, past_key_values=cache, use_cache=use_cache, **inputs)
        logits_V = head(output.last_hidden_state[0, -1])
        logits_V[placeholders] = -torch.inf
        token = int(logits_V.argmax())
        text.append(token)
        if token == end:
            break
        following = torch.tensor([[token]], device=device)
        if use_cache:
            cache, rows, inputs = output.past_key_values, following, {}
        else:
            rows = torch.cat([rows, following], dim=1)
    return text
