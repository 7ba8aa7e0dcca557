"""Choose the held-out clips to speak, and the voice reference of each."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from higgs_tune.config import DataSettings
from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.references import References
from higgs_tune.data.shards import Row
from higgs_tune.data.swap import choose_spread_out
from higgs_tune.listen.options import EvaluateOptions


@dataclass(frozen=True, eq=False)
class Clip:
    """A held-out recording, and the reference for the voice to speak its text in."""

    row: Row
    reference: Row | None  # the row's own (possibly a training recording) or a held-out clip
    system_text: str | None = None

    @property
    def spoken(self) -> Conversation:
        """The conversation whose last turn is the speech to generate."""
        alone = self.reference is None
        talk = tasks.speak(self.row) if alone else tasks.clone(self.row, self.reference)
        return tasks.with_system_turn(talk, self.system_text)


def choose_clips(
    dataset: Dataset,
    data: DataSettings,
    options: EvaluateOptions,
    max_rows: int,
    text_length: Callable[[str], int],
) -> list[Clip]:
    """Up to `options.num_generated` of the clips that losses are measured on, spread over texts and speakers.

    A clip's reference is its own if it has one, else another validation clip of its speaker with another
    text. A clip is spoken without a reference if it has neither, if its own is too long, or if
    `options.task` is speak.

    Args:
        max_rows: positions of the base. A reference is used only if it, the text and the recorded speech
            fit into half of them, so that speech of twice the recorded length fits too.
        text_length: tokens of a text.
    """
    limits = {"max_text": data.max_text_tokens, "text_length": text_length}
    num_codebooks, told = dataset.info.codec.num_codebooks, data.system_text
    longest = tasks.longest_conversation(data, num_codebooks, max_rows, text_length)
    num_told = tasks.system_rows(told, text_length)
    longest, room = longest - num_told, max_rows / 2 - num_told
    sets = validation_sets(
        dataset, data.num_val_clips, max_frames=data.max_frames, max_rows=longest, **limits
    )
    held_out = list(sets.rows)
    texts, speakers = dataset.index["text"], dataset.index["speaker"]
    numbers = choose_spread_out(
        texts[held_out],
        speakers[held_out],
        max(2, options.num_generated),  # of 1 it would keep none: a text may fill half at most
        seed=0,
    )[: options.num_generated]
    chosen = [held_out[number] for number in numbers]
    if options.task == "speak":
        return [Clip(dataset.row(index), None, told) for index in chosen]
    usable = dataset.usable("validation", data.max_frames, **limits)
    candidates = usable[dataset.index["is_clip"][usable]]
    num_rows = dataset.sizes(text_length)["rows"].astype(np.int64)
    references = References(texts, speakers, candidates, num_rows, max_rows=room)
    own_fits = num_rows + dataset.sizes(text_length)["reference_rows"] <= room
    picks = np.random.default_rng(0).random(len(chosen))
    return [
        Clip(
            dataset.row(index),
            _reference(dataset, index, references, pick, bool(own_fits[index])),
            told,
        )
        for index, pick in zip(chosen, picks, strict=True)
    ]


def _reference(
    dataset: Dataset, index: int, references: References, pick: float, own_fits: bool
) -> Row | None:
    """The clip's own reference or a drawn one; None if that is the recording itself, listed twice."""
    row, found = dataset.row(index), None
    if row.ref_text is not None:
        found = own_reference(row) if own_fits else None
    elif references.has_any(np.array([index]))[0]:
        found = dataset.row(references.draw(index, pick))
    is_itself = found is not None and np.array_equal(found.codes[0], row.codes[0])
    return None if is_itself else found


def own_reference(row: Row) -> Row:
    """A row's own reference, as a separate row."""
    assert row.ref_text is not None, row.id
    return Row(f"{row.id}:reference", row.split, "clip", row.speaker, row.ref_text, row.codes[1:2])
