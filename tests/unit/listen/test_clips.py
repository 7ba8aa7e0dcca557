"""Which held-out clips are spoken, and with which reference."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.config import DataSettings
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import CodecFacts, Row, write_dataset
from higgs_tune.listen.clips import Clip, choose_clips
from higgs_tune.listen.options import EvaluateOptions
from higgs_tune.listen.run import _task_notes

CODEC = CodecFacts("fake", 24000, 25.0, num_codebooks=2, codebook_size=256)


def row(number: int, split: str, speaker: str, text: str, ref_text: str | None = None) -> Row:
    codes = tuple(
        np.full((5 + k, 2), number, np.uint16) for k in range(1 if ref_text is None else 2)
    )
    return Row(f"r{number}", split, "clip", speaker, text, codes, ref_text=ref_text)  # type: ignore[arg-type]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Held out: two clips of anna, one of ben, one of anna with its own reference; two others train."""
    rows = [
        row(0, "validation", "anna", "one"),
        row(1, "validation", "anna", "two"),
        row(2, "validation", "ben", "three"),
        row(3, "validation", "anna", "four", ref_text="mine"),
        row(4, "train", "ben", "five"),
        row(5, "train", "anna", "six"),
    ]
    write_dataset(tmp_path, rows, CODEC, rows_per_shard=8)
    return Dataset.open(str(tmp_path))


def chosen(dataset: Dataset, max_rows: int = 1000, **options) -> dict[str, Clip]:
    clips = choose_clips(dataset, DataSettings(), EvaluateOptions(**options), max_rows, len)
    return {clip.row.id: clip for clip in clips}


def test_a_reference_is_another_held_out_clip_of_the_same_speaker(dataset) -> None:
    clips = chosen(dataset)
    assert clips.keys() == {"r0", "r1", "r2", "r3"}
    for number in (0, 1):
        reference = clips[f"r{number}"].reference
        assert reference is not None and reference.speaker == "anna"
        assert reference.split == "validation" and reference.id != f"r{number}"
        assert clips[f"r{number}"].spoken.task == "clone"


def test_a_row_with_its_own_reference_keeps_it(dataset) -> None:
    clip = chosen(dataset)["r3"]
    assert clip.reference is not None
    assert (clip.reference.text, len(clip.reference.codes[0])) == ("mine", 6)
    prompt = clip.spoken.turns
    np.testing.assert_array_equal(prompt[1].parts[0].codes_TC, clip.reference.codes[0])


def test_the_only_held_out_clip_of_a_speaker_has_no_reference(dataset) -> None:
    clip = chosen(dataset)["r2"]
    assert (clip.reference, clip.spoken.task) == (None, "speak")


@pytest.mark.parametrize(("max_rows", "alone"), [(1000, {"r2"}), (100, {"r0", "r1", "r2", "r3"})])
def test_note_counts_the_clips_spoken_without_a_reference(
    dataset, max_rows: int, alone: set[str]
) -> None:
    """ben's other clip is for training; at 100 rows, anna's other held-out clips leave no room."""
    clips = chosen(dataset, max_rows)
    rows = [
        {"clip": name, "system": system, "task": clip.spoken.task}
        for name, clip in clips.items()
        for system in ("recording", "base")
    ]
    assert {name for name, clip in clips.items() if clip.reference is None} == alone
    assert _task_notes(rows) == [
        f"{len(alone)} of 4 clips were spoken without a reference: their speakers have no other held-out "
        "recording with another text that leaves room for the speech. Their speaker similarity is left out."
    ]


def test_a_reference_that_leaves_no_room_for_the_speech_is_not_taken(dataset) -> None:
    rows = int(dataset.sizes(len)["rows"][:2].sum())
    assert chosen(dataset, max_rows=2 * rows)["r0"].reference is not None
    assert chosen(dataset, max_rows=2 * rows - 8)["r0"].reference is None


def test_a_rows_own_reference_that_leaves_no_room_for_the_speech_is_not_taken(dataset) -> None:
    sizes = dataset.sizes(len)
    rows = int(sizes["rows"][3] + sizes["reference_rows"][3])
    assert chosen(dataset, max_rows=2 * rows)["r3"].reference is not None
    clip = chosen(dataset, max_rows=2 * rows - 1)["r3"]
    assert (clip.reference, clip.spoken.task) == (None, "speak")


def test_a_duplicate_of_a_recording_is_not_taken_as_its_reference(tmp_path) -> None:
    rows = [replace(row(0, "validation", "anna", text), id=text) for text in ("one", "two")]
    rows += [row(n, "validation", f"speaker {n}", f"text {n}") for n in (1, 2)]
    write_dataset(tmp_path, rows, CODEC, rows_per_shard=8)
    clips = chosen(Dataset.open(str(tmp_path)))
    assert {"one", "two"} < clips.keys()
    assert all(clip.reference is None for clip in clips.values())


def test_a_clip_with_the_same_text_is_not_taken_as_a_reference(tmp_path) -> None:
    rows = [row(n, "validation", "anna", text) for n, text in enumerate(["one", "one", "two"])]
    write_dataset(tmp_path, rows, CODEC, rows_per_shard=8)
    clips = chosen(Dataset.open(str(tmp_path)))
    drawn = {name: clip.reference.id for name, clip in clips.items() if clip.reference is not None}
    assert drawn.pop("r2") in {"r0", "r1"}
    assert set(drawn.values()) == {"r2"}


def test_clips_of_the_speak_task_have_no_reference(dataset) -> None:
    assert all(clip.reference is None for clip in chosen(dataset, task="speak").values())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_clips_are_chosen_as_asked_for(dataset, count: int) -> None:
    assert len(chosen(dataset, num_generated=count)) == count
