"""Check that a checkpoint's chat template writes the sequences that training uses."""

from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from higgs_tune.data.conversation import AudioPart, Conversation, TextPart, Turn
from higgs_tune.data.tokens import CONTROL_TOKENS, Vocabulary, encode_conversation
from higgs_tune.errors import ModelError

_SYSTEM, _USER = "speak as told", "good day"


def requires_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a checkpoint's chat template refuses a conversation without a system message."""
    if tokenizer.chat_template is None:
        return False
    try:
        tokenizer.apply_chat_template(_messages(), tokenize=False)
    except (jinja2.TemplateError, ValueError):
        return True
    return False


def _messages() -> list[dict[str, Any]]:
    """Messages: a text, and audio as its answer."""
    return [
        {"role": "user", "content": [{"type": "text", "text": _USER}]},
        {"role": "assistant", "content": [{"type": "audio"}]},
    ]


def check_template(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> None:
    """Check that the chat template, if there is one, writes a short conversation as training does.

    The native template requires a system turn first and only audio from the assistant, so the conversation
    has these. Compared are headers, turn ends, control tokens around audio, and how the pieces are tokenised.

    Raises:
        ModelError: the template refuses the conversation or writes another sequence.
    """
    if tokenizer.chat_template is None:
        return
    audio = AudioPart(np.zeros((1, vocabulary.num_codebooks), dtype=np.uint16))
    turns = (
        Turn("system", (TextPart(_SYSTEM),)),
        Turn("user", (TextPart(_USER),)),
        Turn("assistant", (audio,), target=True),
    )
    ours = encode_conversation(Conversation("template", "speak", turns), vocabulary)
    num_delay = vocabulary.num_codebooks - 1
    frames = CONTROL_TOKENS["audio"] * (len(ours.codes_AC) - num_delay)
    system = {"role": "system", "content": [{"type": "text", "text": _SYSTEM}]}
    messages = [system, *_messages()]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, ValueError) as error:
        raise ModelError(
            f"chat template of {tokenizer.name_or_path} does not accept a text that is answered with "
            f"audio ({error}). Use the tokenizer that belongs to the Higgs Audio V2 checkpoint."
        ) from None
    text = text.replace(CONTROL_TOKENS["audio"], frames + CONTROL_TOKENS["audio_delay"] * num_delay)
    theirs = tokenizer.encode(text, add_special_tokens=False)
    if theirs != ours.ids_L.tolist():
        raise ModelError(
            f"chat template of {tokenizer.name_or_path} writes {tokenizer.decode(theirs)!r} where "
            f"training writes {tokenizer.decode(ours.ids_L.tolist())!r}: the model would be trained on "
            "other sequences than it gets in use. Use the checkpoint's own tokenizer."
        )
