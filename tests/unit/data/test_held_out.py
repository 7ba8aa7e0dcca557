"""The validation sets."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.plain_text import plain_text
from higgs_tune.data.swap import choose_spread_out, group_labels, swaps
from higgs_tune.errors import DataError
from tests.unit.data.rows import audio, chat, clip, encoded_rows, make, row_of, text


def test_validation_also_fits_the_base_with_swapped_audio(tmp_path: Path):
    rows = [clip(n, "validation", num_frames=10 + n, text="x" * (60 - n)) for n in range(40)]
    dataset = make(tmp_path, [*rows, clip(99)])
    sets = validation_sets(dataset, 40, max_rows=105)
    assert len(sets.transcribe) == 14, "clips of 10 to 23 frames, texts of 60 to 47 letters"
    for conversation in (*sets.transcribe, *sets.transcribe_swapped, *sets.speak):
        assert encoded_rows(conversation) <= 105
    with pytest.raises(
        DataError, match=r"has 0 usable clips.* data\.max_text_tokens or data\.max_rows"
    ):
        validation_sets(dataset, 40, max_rows=30)


def test_swaps_permute_audio_between_different_texts_of_similar_length(tmp_path: Path):
    rows = [
        clip(n, "validation", speaker=f"s{n % 4}", text=f"sentence {n // 4}") for n in range(200)
    ]
    rows += [clip(n) for n in range(200, 210)]
    dataset = make(tmp_path, rows)
    sets = validation_sets(dataset, 48)
    assert len(sets.transcribe) == len(sets.transcribe_swapped) == len(sets.speak) == 48
    by_codes = {row.codes[0].tobytes(): row for row in rows}
    distances = []
    for own, swapped in zip(sets.transcribe, sets.transcribe_swapped, strict=True):
        assert text(own, 1) == text(swapped, 1) == by_codes[audio(own, 0).tobytes()].text
        assert by_codes[audio(swapped, 0).tobytes()].text != text(own, 1)
        distances.append(abs(len(audio(own, 0)) - len(audio(swapped, 0))))
    own, swapped = (
        sorted(audio(c, 0).tobytes() for c in part)
        for part in (sets.transcribe, sets.transcribe_swapped)
    )
    assert own == swapped
    assert np.mean(distances) < 3, "48 clips of 5 to 59 frames lie about 1 apart"
    again = validation_sets(Dataset.open(str(tmp_path)), 48)
    assert [c.key for c in again.transcribe_swapped] == [c.key for c in sets.transcribe_swapped]


def test_two_spellings_of_a_sentence_are_never_swapped(tmp_path: Path):
    sentences = [f"أُحِبُّ البَيْتَ {n}" for n in range(12)]
    spellings = [spelling for s in sentences for spelling in (s, plain_text(s) + ".")]
    rows = [
        clip(n, "validation", text=spelling, num_frames=20 + 9 * (n // 2))
        for n, spelling in enumerate(spellings)
    ]
    swapped = validation_sets(make(tmp_path, [*rows, clip(99)]), 48).transcribe_swapped
    pairs = [conversation.key.split(":transcribe:audio=") for conversation in swapped]
    assert len(pairs) == 24
    assert all(int(own[1:]) // 2 != int(other[1:]) // 2 for own, other in pairs)


def test_two_clips_of_one_recording_are_never_swapped(tmp_path: Path):
    """Its own audio would be the nearest in length, and a model that listens would show no gain."""
    rows = []
    for n in range(16):
        first = clip(n, "validation", text=f"row {n} in digits", num_frames=20 + 9 * n)
        rows += [first, replace(first, id=f"r{n}b", text=f"the {n}th in words")]
    sets = validation_sets(make(tmp_path, [*rows, clip(99)]), 48)
    assert len(sets.transcribe) == 32
    for own, swapped in zip(sets.transcribe, sets.transcribe_swapped, strict=True):
        assert text(own, 1) == text(swapped, 1)
        assert not np.array_equal(audio(own, 0), audio(swapped, 0))


def test_validation_needs_at_least_two_recordings(tmp_path: Path):
    first = clip(0, "validation")
    rows = [first, replace(first, id="r1", text="the same in words"), clip(99)]
    with pytest.raises(DataError, match="2 different texts, needed at least 2 from two recordings"):
        validation_sets(make(tmp_path, rows), 48)


def test_clips_linked_by_texts_or_recordings_form_one_group():
    texts = ["one", "two", "Two!", "three", "four"]
    labels = group_labels(texts, [b"a", b"b", b"c", b"c", b"d"])
    assert labels == ["one", "two", "two", "two", "four"]


def test_audio_is_swapped_within_a_language(tmp_path: Path):
    """A model can recognise another language without understanding a word."""
    rows = [
        replace(clip(n, "validation", num_frames=20 + n), language=("de", "fi")[n % 2])
        for n in range(40)
    ]
    sets = validation_sets(make(tmp_path, [*rows, clip(99)]), 40)
    pairs = [c.key.removeprefix("r").split(":transcribe:audio=r") for c in sets.transcribe_swapped]
    assert len(pairs) == 40
    assert all(int(own) % 2 == int(other) % 2 for own, other in pairs)


def test_a_language_with_too_few_clips_is_swapped_with_the_next_larger():
    languages = ["de"] * 4 + ["fi"] * 6 + ["tr"]
    groups, lengths = [f"t{n}" for n in range(11)], list(range(30, 41))
    result = swaps(groups, lengths, languages)
    assert sorted(result) == list(range(11))
    assert all(groups[i] != groups[j] for i, j in enumerate(result))
    assert {result[i] for i in range(4, 10)} == set(range(4, 10))
    assert swaps(["a", "b"], [3, 4], ["de", "fi"]) == [1, 0]


def test_validation_is_spread_over_texts_and_speakers(tmp_path: Path):
    rows = [
        clip(n, "validation", speaker=f"s{n // 40}", text=f"sentence {n % 40}") for n in range(160)
    ]
    sets = validation_sets(make(tmp_path, rows), 20)
    numbers = [int(row_of(c)[1:]) for c in sets.transcribe]
    assert len({n % 40 for n in numbers}) == 20
    assert Counter(n // 40 for n in numbers) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_no_text_fills_more_than_half_of_validation(tmp_path: Path):
    rows = [clip(n, "validation", text="same") for n in range(9)] + [clip(9, "validation")]
    sets = validation_sets(make(tmp_path, rows), 10)
    assert sorted(text(c, 1) for c in sets.transcribe) == ["same", "text 9"]


@pytest.mark.parametrize("texts", [["a"], ["a", "a"], []])
def test_validation_without_two_texts_is_an_error(tmp_path: Path, texts: list[str]):
    rows = [clip(n, "validation", text=t) for n, t in enumerate(texts)] + [clip(9)]
    dataset = make(tmp_path, rows)
    with pytest.raises(DataError, match=f"{len(texts)} usable clips with {len(set(texts))} diff"):
        validation_sets(dataset, 10)


def test_swaps_always_change_the_text_if_no_text_has_a_majority():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(2, 25))
        texts = [f"t{n}" for n in rng.integers(0, 6, size)]
        if 2 * max(Counter(texts).values()) > size:
            continue
        languages = rng.choice(["de", "en", None], size).tolist()
        result = swaps(texts, rng.integers(1, 50, size).tolist(), languages)
        assert sorted(result) == list(range(size))
        assert all(texts[i] != texts[j] for i, j in enumerate(result))


def test_no_exchange_of_two_swaps_would_bring_lengths_nearer():
    rng = np.random.default_rng(0)
    texts = [f"t{n % 6}" for n in range(24)]
    lengths = rng.integers(10, 90, 24).tolist()
    result = swaps(texts, lengths, [None] * 24)

    def apart(i: int, j: int) -> float:
        return np.inf if texts[i] == texts[j] else abs(lengths[i] - lengths[j])

    for i, j in combinations(range(24), 2):
        now = apart(i, result[i]) + apart(j, result[j])
        assert now <= apart(i, result[j]) + apart(j, result[i])


@pytest.mark.parametrize("seed", range(5))
def test_clips_are_spread_over_texts_before_speakers(seed: int):
    texts, speakers = np.array([0] * 5 + [1, 2, 3, 4, 5]), np.array([0] * 5 + [1] * 5)
    places = choose_spread_out(texts, speakers, 4, seed)
    assert len({int(texts[place]) for place in places}) == 4


def test_chats_are_not_used_for_validation(tmp_path: Path):
    rows = [clip(n, "validation") for n in range(4)]
    rows += [replace(chat(n), split="validation") for n in range(4)]
    sets = validation_sets(make(tmp_path, rows), 8)
    assert sorted(row_of(c) for c in sets.transcribe) == ["r0", "r1", "r2", "r3"]
