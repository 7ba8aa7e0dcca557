"""Which rows validate: given by the manifest, or drawn so that no text is on both sides.

The draw goes by hashes of texts and speakers, not by places: rows that are added later do not move
the others.
"""

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.errors import DataError

_MIN_SPEAKERS = 5  # fewer, and a held-out voice would be too large a share of the data
_MAX_LEFT_OUT = 0.02  # share of the rows that a speaker split may leave out
GIVEN = "given by the manifest's split column"


def assign_splits(
    rows: Sequence[ManifestRow], val_fraction: float, seed: int
) -> tuple[list[ManifestRow], list[Rejection], str]:
    """Rows with their split, rows left out with the reason, and the rule in words.

    Raises:
        DataError: some rows have a split and others none, or there are too few texts to divide.
    """
    named = [row for row in rows if row.split is not None]
    if named and len(named) < len(rows):
        first = next(row for row in rows if row.split is None)
        raise DataError(
            f"row {first.number} (id {first.id!r}) has no split, {len(named)} of {len(rows)} rows "
            "have one. Fill in the column for all rows or for none."
        )
    if named:
        return list(rows), [], GIVEN
    if val_fraction == 0:
        return [replace(row, split="train") for row in rows], [], "all rows train"
    texts = [normal_text(row.text) for row in rows]
    if len(set(texts)) < 3:
        raise DataError(
            f"found {len(set(texts))} different texts, needed at least 3 to hold some out for "
            "validation. Add recordings, or a split column, or prepare with --val-fraction 0."
        )
    target = max(2, round(val_fraction * len(rows)))
    drawn = f"drawn with seed {seed} for {val_fraction:g} of the rows"
    by_speaker = _by_speaker(rows, texts, target, seed)
    if by_speaker is not None:
        splits, rule = by_speaker, f"{drawn}: no speaker and no text is shared"
    else:
        splits = _by_text(texts, target, seed)
        rule = f"{drawn}: no text is shared, speakers are"
    kept = [replace(row, split=split) for row, split in zip(rows, splits, strict=True) if split]
    left_out = [
        Rejection(
            row.number,
            row.id,
            row.audio[0],
            "left out: a validation speaker says a text of the train split",
        )
        for row, split in zip(rows, splits, strict=True)
        if split is None
    ]
    return kept, left_out, rule


def normal_text(text: str) -> str:
    """Texts that differ only in case, spacing or Unicode form count as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shared_texts(rows: Sequence[ManifestRow]) -> int:
    """How many texts are in both splits."""
    sides: dict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        sides[normal_text(row.text)].add(row.split)
    return sum(len(found) > 1 for found in sides.values())


def _order(names: Sequence[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())


def _brings_nearer(count: int, missing: int) -> bool:
    return count <= 2 * missing  # or it would overshoot by more than is missing now


def _by_text(texts: list[str], target: int, seed: int) -> list[str | None]:
    """Whole texts go to validation, about `target` rows; two texts at least, not all."""
    counts = Counter(texts)
    chosen: set[str] = set()
    num_rows = 0
    for text in _order(list(counts), seed):
        if len(chosen) + 1 < len(counts) and (
            len(chosen) < 2 or _brings_nearer(counts[text], target - num_rows)
        ):
            chosen.add(text)
            num_rows += counts[text]
    return ["validation" if text in chosen else "train" for text in texts]


def _by_speaker(
    rows: Sequence[ManifestRow], texts: list[str], target: int, seed: int
) -> list[str | None] | None:
    """Whole speakers go to validation; None where that is impossible or would leave out too much.

    Rows without a speaker might be anyone's: they make a split by speaker impossible.
    """
    counts = Counter(row.speaker for row in rows)
    if "" in counts or len(counts) < _MIN_SPEAKERS:
        return None
    chosen: set[str] = set()
    num_rows = 0
    for speaker in _order(list(counts), seed):
        if _brings_nearer(counts[speaker], target - num_rows):
            chosen.add(speaker)
            num_rows += counts[speaker]
    if not chosen:
        chosen = {min(counts, key=lambda speaker: (counts[speaker], speaker))}
    train_texts = {text for row, text in zip(rows, texts, strict=True) if row.speaker not in chosen}
    splits: list[str | None] = []
    for row, text in zip(rows, texts, strict=True):
        if row.speaker not in chosen:
            splits.append("train")
        else:
            splits.append(None if text in train_texts else "validation")
    held = {text for text, split in zip(texts, splits, strict=True) if split == "validation"}
    if len(held) < 2 or splits.count(None) > _MAX_LEFT_OUT * len(rows):
        return None
    return splits
