"""Training and validation examples of a dataset: tokenised once, too long ones left out."""

import logging
from functools import partial
from typing import Any

from higgs_tune.config import DataSettings
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import ValidationSets, validation_sets
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.rows import text_problem
from higgs_tune.data.tasks import longest_conversation, system_rows
from higgs_tune.data.tokens import (
    Encoded,
    Vocabulary,
    encode_conversation,
    unknown_in,
    unknown_problem,
)
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.model.load import Base
from higgs_tune.model.template import requires_system

logger = logging.getLogger(__name__)
_CACHED_ROWS = 4_000_000  # of cached tokenised examples; at most 152 bytes per row with 8 codebooks


def check_fits(dataset: Dataset, base: Base) -> None:
    """Refuse a dataset that this base cannot read.

    Raises:
        DataError: it was coded for another base, or its texts have characters without a token.
    """
    config, codec = base.model.config, dataset.info.codec
    num_codes = min(config.audio_stream_bos_id, config.audio_stream_eos_id)
    if (codec.num_codebooks, codec.codebook_size) != (config.num_codebooks, num_codes):
        raise DataError(
            f"{dataset.directory}: encoded with {codec.num_codebooks} codebooks of "
            f"{codec.codebook_size}, the base {base.source} needs {config.num_codebooks} of "
            f"{num_codes}. Prepare the data again with the codec of this base."
        )
    check_texts(dataset, base.vocabulary)


def check_texts(dataset: Dataset, vocabulary: Vocabulary) -> None:
    """Refuse a dataset with characters that the vocabulary has no token for.

    Raises:
        DataError: names the number of such rows, the first of them, and all such characters.
    """
    if vocabulary.unknown is None:
        return
    rows: list[str] = []
    characters: set[str] = set()
    for row_id, texts in dataset.texts():
        found = {one for text in texts for one in unknown_in(text, vocabulary)}
        if found:
            rows.append(row_id)
            characters |= found
    if rows:
        raise DataError(
            f"{dataset.directory}: in {len(rows)} of {len(dataset.index)} rows (first {rows[0]!r}) "
            + unknown_problem(sorted(characters))
        )


class Examples:
    """Tokenises a dataset's conversations for one base, and caches them by key."""

    def __init__(
        self, base: Base, dataset: Dataset, data: DataSettings, *, warns: bool = True
    ) -> None:
        self._dataset, self._tasks, self._warns = dataset, data.tasks, warns
        self._vocabulary = base.vocabulary
        config = base.model.config
        _check_system_text(data.system_text, base.vocabulary)
        text_length = partial(_num_tokens, base.vocabulary)
        self._max_rows = longest_conversation(
            data, config.num_codebooks, config.max_position_embeddings, text_length
        )
        if warns and data.system_text is None and requires_system(base.tokenizer):
            logger.warning(
                "the chat template of %s expects a system message, and data.system_text is not set: clips "
                "are trained without one, so use the adapter without that template",
                base.source,
            )
        self._encoded: dict[str, Encoded] = {}
        self._num_rows = 0
        # how conversations are made, for training orders and validation sets alike
        self.making: dict[str, Any] = {
            "max_frames": data.max_frames,
            "max_text": data.max_text_tokens,
            "max_rows": self._max_rows - system_rows(data.system_text, text_length),
            "text_length": text_length,
            "system_text": data.system_text,
        }

    def order(self, batch_clips: int, seed: int) -> TrainOrder:
        """The order of a trial's training rows; warns once about rows that no trial can use.

        Raises:
            DataError: the tasks and limits leave no row.
        """
        order = TrainOrder(self._dataset, self._tasks, batch_clips, seed, **self.making)
        if order.num_skipped and self._warns:
            logger.warning(
                "%d of %d rows of the train split are left out: longer than data.max_frames, "
                "data.max_text_tokens or data.max_rows allow, or usable for no task of data.tasks",
                order.num_skipped,
                order.num_skipped + order.num_rows,
            )
        self._warns = False
        return order

    def validation(self, num_clips: int) -> ValidationSets:
        """The validation sets; warns if they have fewer clips than asked for.

        Raises:
            DataError: there are no two usable clips with different texts.
        """
        sets = validation_sets(self._dataset, num_clips, **self.making)
        if len(sets.rows) < num_clips and self._warns:
            logger.warning(
                "%d validation clips can be used, data.num_val_clips is %d: the fewer there are, the less "
                "their losses say about other clips",
                len(sets.rows),
                num_clips,
            )
        return sets

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokenise a conversation, once per row and task.

        Raises:
            ConfigError: it is longer than the settings and the base allow.
        """
        encoded = self._encoded.get(conversation.key)
        if encoded is None:
            if self._num_rows >= _CACHED_ROWS:
                self._encoded.clear()
                self._num_rows = 0
            encoded = encode_conversation(conversation, self._vocabulary)
            if encoded.num_rows > self._max_rows:  # orders drop such rows by estimate only
                raise ConfigError(
                    f"{conversation.key}: {encoded.num_rows} rows, data.max_rows and the base allow "
                    f"{self._max_rows}. Lower data.max_frames or data.max_text_tokens."
                )
            self._encoded[conversation.key] = encoded
            self._num_rows += encoded.num_rows
        return encoded


def _check_system_text(text: str | None, vocabulary: Vocabulary) -> None:
    if text is None:
        return
    problem = text_problem(text, len(text))
    if unknown := unknown_in(text, vocabulary):
        problem = problem or f"the base has no token for {', '.join(map(repr, unknown))}"
    if problem:
        raise ConfigError(f"data.system_text: {problem}. Give a text that the base can read.")


def _num_tokens(vocabulary: Vocabulary, text: str) -> int:
    return len(vocabulary.encode_text(text))
