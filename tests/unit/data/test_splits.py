"""Validation rows are drawn so that nothing leaks, and stay where they are when rows are added."""

from dataclasses import replace

import numpy as np
import pytest

from higgs_tune.data import splits
from higgs_tune.data.files import scratch_database
from higgs_tune.data.row_table import RowTable
from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.data.splits import GIVEN, normal_text
from higgs_tune.errors import DataError


def row(number: int, text: str, speaker: str = "", split: str | None = None) -> ManifestRow:
    return ManifestRow(number, f"r{number}", split, speaker, None, "clip", text, (f"{number}.wav",))


def assign_splits(
    rows: list[ManifestRow], val_fraction: float, seed: int
) -> tuple[list[ManifestRow], list[Rejection], str]:
    """Rows with their split, rows that are left out, the rule."""
    with scratch_database() as database:
        table = RowTable(database)
        for one in rows:
            table.add(one)
        rule = splits.assign_splits(table, val_fraction, seed)
        return list(table.rows()), list(table.rejected()), rule


def shared_texts(rows: list[ManifestRow]) -> int:
    with scratch_database() as database:
        table = RowTable(database)
        for one in rows:
            table.add(one)
        return splits.shared_texts(table)


def texts_of(rows: list[ManifestRow], split: str) -> set[str]:
    return {normal_text(row.text) for row in rows if row.split == split}


def speakers_of(rows: list[ManifestRow], split: str) -> set[str]:
    return {row.speaker for row in rows if row.split == split}


@pytest.mark.parametrize("seed", range(20))
def test_no_text_is_ever_shared(seed: int):
    rng = np.random.default_rng(seed)
    num_texts, num_speakers = int(rng.integers(3, 60)), int(rng.integers(1, 9))
    rows = [
        row(n, f"Text {rng.integers(num_texts)}{' ' * (n % 2)}", f"s{rng.integers(num_speakers)}")
        for n in range(100)
    ]
    kept, left_out, _ = assign_splits(rows, 0.1, seed)
    assert not texts_of(kept, "train") & texts_of(kept, "validation")
    assert len(texts_of(kept, "validation")) >= 2
    assert texts_of(kept, "train")
    assert len(kept) + len(left_out) == len(rows)
    assert shared_texts(kept) == 0


def test_from_five_speakers_on_no_speaker_is_shared():
    rows = [row(n, f"text {n}", f"s{n % 12}") for n in range(240)]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    assert not speakers_of(kept, "train") & speakers_of(kept, "validation")
    assert sum(row.split == "validation" for row in kept) in (20, 40)
    assert not left_out
    assert rule == "drawn with seed 0 for 0.1 of the rows: no speaker and no text is shared"


def test_a_few_texts_across_the_border_are_left_out_of_validation():
    rows = [row(n, "Yes." if n < 4 else f"text {n}", f"s{n % 12}") for n in range(240)]
    some = [assign_splits(rows, 0.1, seed) for seed in range(12)]
    assert any(left_out for _, left_out, _ in some)
    for kept, left_out, rule in some:
        assert rule.endswith("no speaker and no text is shared")
        assert not texts_of(kept, "train") & texts_of(kept, "validation")
        assert all("left out: a validation speaker" in one.reason for one in left_out)


def test_voices_that_all_say_the_same_texts_are_split_by_text():
    rows = [row(n, f"text {n // 8}", f"s{n % 8}") for n in range(400)]
    kept, left_out, rule = assign_splits(rows, 0.1, 3)
    assert not left_out
    assert sum(row.split == "validation" for row in kept) == 40
    assert speakers_of(kept, "validation") == speakers_of(kept, "train")
    assert rule == "drawn with seed 3 for 0.1 of the rows: no text is shared, speakers are"


def test_unknown_speakers_are_split_by_text():
    rows = [row(n, f"text {n}", f"s{n % 9}" if n else "") for n in range(90)]
    assert assign_splits(rows, 0.1, 0)[2].endswith("no text is shared, speakers are")


def test_rows_that_are_added_do_not_move_the_others():
    rows = [row(n, f"text {n}") for n in range(400)]
    before = {r.id: r.split for r in assign_splits(rows[:380], 0.1, 0)[0]}
    after = {r.id: r.split for r in assign_splits(rows, 0.1, 0)[0]}
    assert sum(before[name] != after[name] for name in before) <= 4
    assert before != {r.id: r.split for r in assign_splits(rows[:380], 0.1, 1)[0]}


def test_a_given_split_is_kept_and_its_shared_texts_counted():
    rows = [
        row(0, "a", split="train"),
        row(1, "A ", split="validation"),
        row(2, "b", split="train"),
    ]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    assert (kept, left_out, rule) == (rows, [], GIVEN)
    assert shared_texts(kept) == 1


def test_a_split_for_some_rows_only_is_an_error():
    rows = [row(0, "a", split="train"), row(1, "b")]
    with pytest.raises(DataError, match=r"row 1 \(id 'r1'\) has no split, 1 of 2 rows have one"):
        assign_splits(rows, 0.1, 0)


def test_too_few_texts_to_divide_is_an_error_unless_all_train():
    rows = [row(n, f"text {n % 2}") for n in range(9)]
    with pytest.raises(DataError, match="found 2 different texts, needed at least 3"):
        assign_splits(rows, 0.1, 0)
    kept, _, rule = assign_splits(rows, 0, 0)
    assert kept == [replace(r, split="train") for r in rows]
    assert rule == "all rows train"
