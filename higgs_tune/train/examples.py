"""Tokenised examples of a loop, each made once, and the lengths that it takes."""

from typing import Any

from higgs_tune.config import DataSettings
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.tasks import longest_conversation
from higgs_tune.data.tokens import Encoded, encode_conversation
from higgs_tune.errors import ConfigError
from higgs_tune.model.load import Base

_CACHED_ROWS = 4_000_000  # of tokenised examples kept; at most 152 bytes each with 8 codebooks


class Examples:
    """Tokenises conversations for one base, and keeps them by their key."""

    def __init__(self, base: Base, data: DataSettings) -> None:
        self._vocabulary = base.vocabulary
        config = base.model.config
        self._max_rows = longest_conversation(
            data, config.num_codebooks, config.max_position_embeddings
        )
        self._encoded: dict[str, Encoded] = {}
        self._num_rows = 0
        self.length_limits: dict[str, Any] = {
            "max_frames": data.max_frames,
            "max_text": data.max_text_tokens,
            "max_rows": self._max_rows,
            "text_length": lambda text: len(base.vocabulary.encode_text(text)),
        }

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenise once per row and task.

        Raises:
            ConfigError: longer than the settings and the base allow.
        """
        encoded = self._encoded.get(conversation.key)
        if encoded is None:
            if self._num_rows >= _CACHED_ROWS:
                self._encoded.clear()
                self._num_rows = 0
            encoded = encode_conversation(conversation, self._vocabulary)
            if encoded.num_rows > self._max_rows:  # the orders leave such rows out by estimate
                raise ConfigError(
                    f"{conversation.key}: {encoded.num_rows} rows, data.max_rows and the base allow "
                    f"{self._max_rows}. Lower data.max_frames or data.max_text_tokens."
                )
            self._encoded[conversation.key] = encoded
            self._num_rows += encoded.num_rows
        return encoded
