"""The fixed validation conversations of a dataset."""

from dataclasses import dataclass

import numpy as np

from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.swap import choose_spread_out, group_labels, limit_groups_to_half, swaps
from higgs_tune.errors import DataError


@dataclass(frozen=True)
class ValidationSets:
    """Fixed validation conversations.

    `transcribe_swapped[i]` has the text of `transcribe[i]` after the audio of a clip with another text,
    which is another recording.
    """

    rows: tuple[int, ...]  # indices of the clips
    transcribe: tuple[Conversation, ...]
    transcribe_swapped: tuple[Conversation, ...]
    speak: tuple[Conversation, ...]


def validation_sets(
    dataset: Dataset,
    num_val_clips: int,
    *,
    max_frames: int | None = None,
    max_text: int | None = None,
    max_rows: int | None = None,
    text_length: tasks.TextLength = len,
    system_text: str | None = None,
) -> ValidationSets:
    """Draw the validation clips, spread evenly over texts and speakers, the same for every trial.

    Args:
        max_rows: most rows of a conversation, without its system turn.

    Raises:
        DataError: the validation split has no two usable clips with different texts.
    """
    usable = dataset.usable("validation", max_frames, max_text, text_length)
    clips = usable[dataset.index["is_clip"][usable]]
    if max_rows is not None:
        clips = _fitting_in_pairs(dataset, clips, max_rows, text_length)
    texts, speakers = dataset.index["text"][clips], dataset.index["speaker"][clips]
    places = choose_spread_out(texts, speakers, num_val_clips, seed=0)
    drawn = sorted(clips[places].tolist())
    rows = [dataset.row(index) for index in drawn]
    groups = group_labels([row.text for row in rows], [row.codes[0].tobytes() for row in rows])
    kept = limit_groups_to_half(groups)
    if len(kept) < 2:
        raise DataError(
            f"{dataset.directory}: the validation split has {len(clips)} usable clips with "
            f"{len(np.unique(texts))} different texts, needed at least 2 from two recordings "
            "(chat rows do not validate). Prepare the dataset with a larger --val-fraction "
            "or --clips-from-chat, or raise data.max_frames, data.max_text_tokens or data.max_rows."
        )
    rows, groups = [rows[place] for place in kept], [groups[place] for place in kept]
    lengths, languages = [row.num_frames[0] for row in rows], [row.language for row in rows]
    others = swaps(groups, lengths, languages)
    return ValidationSets(
        rows=tuple(drawn[place] for place in kept),
        transcribe=tuple(tasks.transcribe(row) for row in rows),
        transcribe_swapped=tuple(
            tasks.transcribe(row, audio_of=rows[other])
            for row, other in zip(rows, others, strict=True)
        ),
        speak=tuple(tasks.with_system_turn(tasks.speak(row), system_text) for row in rows),
    )


def _fitting_in_pairs(
    dataset: Dataset, clips: np.ndarray, max_rows: int, text_length: tasks.TextLength
) -> np.ndarray:
    """Drop the longest clips, so that any clip's audio and any other's text fit into `max_rows`."""
    sizes = dataset.sizes(text_length)[clips]
    order = np.argsort(sizes["rows"], kind="stable")
    longest = np.maximum.accumulate((sizes["rows"] - sizes["text"])[order])
    longest += np.maximum.accumulate(sizes["text"][order])
    return np.sort(clips[order[longest <= max_rows]])
