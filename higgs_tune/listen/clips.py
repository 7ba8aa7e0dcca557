"""Which held-out clips are spoken, and after which reference."""

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
from higgs_tune.data.swap import spread
from higgs_tune.listen.options import EvaluateOptions

_SUFFIX = ":transcribe"


@dataclass(frozen=True, eq=False)
class Clip:
    """A held-out recording, and the voice that it is to be spoken in."""

    row: Row
    reference: Row | None  # another held-out clip of its speaker, as a row of its own

    @property
    def spoken(self) -> Conversation:
        """The conversation whose last turn is the speech."""
        if self.reference is None:
            return tasks.speak(self.row)
        return tasks.clone(self.row, self.reference)


def choose_clips(
    dataset: Dataset,
    data: DataSettings,
    options: EvaluateOptions,
    max_rows: int,
    text_length: Callable[[str], int],
    seed: int = 0,
) -> list[Clip]:
    """Some of the validation clips of the losses, spread over texts and speakers.

    The reference is the clip's own where it has one, else another validation clip of its speaker
    with another text; a clip with neither, or with `options.task` speak, is spoken without.

    Args:
        max_rows: positions of the base; the reference, the text and as much speech as was recorded
            fit into half of them, so that speech twice as long does.
    """
    limits = {"max_text": data.max_text_tokens, "text_length": text_length}
    sets = validation_sets(
        dataset, data.num_val_clips, max_frames=data.max_frames, max_rows=max_rows, **limits
    )
    place = {row_id: index for index, row_id in enumerate(dataset.ids)}
    held_out = [place[talk.key.removesuffix(_SUFFIX)] for talk in sets.transcribe]
    numbers = spread(
        [dataset.texts[index] for index in held_out],
        [dataset.speakers[index] for index in held_out],
        max(2, options.num_generated),  # it needs two texts for less than one half each
        seed,
    )[: options.num_generated]
    chosen = [held_out[number] for number in numbers]
    if options.task == "speak":
        return [Clip(dataset.row(index), None) for index in chosen]
    usable = dataset.usable("validation", data.max_frames, **limits)
    candidates = [index for index in usable if dataset.kinds[index] == "clip"]
    num_rows = np.zeros(len(dataset.ids), dtype=np.int64)
    for index in candidates:
        num_rows[index] = dataset.most_rows(index, text_length)
    references = References(
        dataset.texts, dataset.speakers, candidates, num_rows, max_rows=max_rows / 2
    )
    picks = np.random.default_rng(seed).random(len(chosen))
    return [
        Clip(dataset.row(index), _reference(dataset, index, references, pick))
        for index, pick in zip(chosen, picks, strict=True)
    ]


def _reference(dataset: Dataset, index: int, references: References, pick: float) -> Row | None:
    row = dataset.row(index)
    if row.ref_text is not None:
        return own_reference(row)
    return dataset.row(references.draw(index, pick)) if references.exist(index) else None


def own_reference(row: Row) -> Row:
    """The reference that a row brings along, as a row of its own."""
    assert row.ref_text is not None, row.id
    return Row(f"{row.id}:reference", row.split, "clip", row.speaker, row.ref_text, row.codes[1:2])
