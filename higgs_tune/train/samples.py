"""An adapter's transcriptions of validation clips, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import HiggsAudioV2ForConditionalGeneration

from higgs_tune.data.conversation import Conversation, TextPart
from higgs_tune.data.tokens import encode_conversation
from higgs_tune.model.load import Base
from higgs_tune.model.writing import prompt_before_text, write_text
from higgs_tune.train.checkpoint import adapted


@dataclass(frozen=True)
class Sample:
    """A clip's text, and the adapter's transcription of it."""

    key: str
    target: str
    predicted: str
    ended: bool  # false: cut off at the longest length


def sample_predictions(
    base: Base, adapter: Path, clips: Sequence[Conversation], max_tokens: int
) -> list[Sample]:
    """Transcribe `transcribe` clips with an adapter from disk; leaves `base` as it was."""
    with adapted(base.model, adapter) as model:
        return [_sample(base, model, clip, max_tokens) for clip in clips]


def _sample(
    base: Base, model: HiggsAudioV2ForConditionalGeneration, clip: Conversation, max_tokens: int
) -> Sample:
    target = "".join(
        part.text
        for turn in clip.turns
        if turn.target
        for part in turn.parts
        if isinstance(part, TextPart)
    )
    prompt = prompt_before_text(encode_conversation(clip, base.vocabulary))
    written = write_text(model, base.vocabulary, prompt, max_tokens)
    predicted = base.tokenizer.decode(list(written.ids))
    assert isinstance(predicted, str)
    return Sample(clip.key, target, predicted, written.reached_end)
