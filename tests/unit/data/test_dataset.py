"""Reading a prepared dataset, the order of training, the validation sets."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.config import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.conversation import AudioPart, Conversation, TextPart
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.shards import CodecFacts, Row, list_shards, write_dataset
from higgs_tune.data.swap import derange
from higgs_tune.data.tokens import Vocabulary, encode_conversation
from higgs_tune.errors import DataError

CODEC = CodecFacts("fake", 24000, 25.0, num_codebooks=2, codebook_size=256)
LETTERWISE = Vocabulary(
    *range(1, 9),
    stream_bos=256,
    stream_eos=257,
    num_codebooks=2,
    encode_text=lambda text: (
        [9] if text in ("user", "assistant", "\n\n") else [10 + ord(c) for c in text]
    ),
)


def clip(
    number: int,
    split: str = "train",
    speaker: str = "s0",
    text: str | None = None,
    num_frames: int | None = None,
    ref_text: str | None = None,
) -> Row:
    rng = np.random.default_rng(number)

    def codes(frames: int) -> np.ndarray:
        return rng.integers(0, 256, (frames, 2)).astype(np.uint16)

    frames = num_frames or int(rng.integers(5, 60))
    return Row(
        id=f"r{number}",
        split=split,  # type: ignore[arg-type]
        kind="clip",
        speaker=speaker,
        text=f"text {number}" if text is None else text,
        codes=(codes(frames),) if ref_text is None else (codes(frames), codes(7)),
        ref_text=ref_text,
    )


def chat(number: int) -> Row:
    turns = [
        {"role": "user", "parts": [{"type": "text", "text": "ask"}]},
        {"role": "assistant", "parts": [{"type": "audio", "audio": 0}]},
        {"role": "user", "parts": [{"type": "audio", "audio": 1}]},
        {"role": "assistant", "parts": [{"type": "text", "text": "say"}]},
    ]
    codes = tuple(np.full((k + 3, 2), k, dtype=np.uint16) for k in range(2))
    text = json.dumps(turns)
    return Row(f"c{number}", "train", "chat", "s0", "say", codes, turns=text, start_index=2)


def make(path: Path, rows: list[Row], rows_per_shard: int = 1024) -> Dataset:
    write_dataset(path, rows, CODEC, rows_per_shard=rows_per_shard)
    return Dataset.open(str(path))


def row_of(conversation: Conversation) -> str:
    return conversation.key.split(":")[0]


def audio(conversation: Conversation, turn: int) -> np.ndarray:
    part = conversation.turns[turn].parts[0]
    assert isinstance(part, AudioPart)
    return part.codes_TC


def text(conversation: Conversation, turn: int) -> str:
    part = conversation.turns[turn].parts[0]
    assert isinstance(part, TextPart)
    return part.text


def test_rows_come_back_as_written(tmp_path: Path):
    rows = [clip(n, ref_text="ref" if n % 3 == 0 else None) for n in range(150)] + [chat(0)]
    dataset = make(tmp_path, rows, rows_per_shard=70)
    assert len(list_shards(tmp_path)) == 3
    for index in [150, 0, 69, 70, 63, 64, 149]:
        found, wanted = dataset.row(index), rows[index]
        for name in ("id", "split", "kind", "speaker", "text", "ref_text", "turns", "start_index"):
            assert getattr(found, name) == getattr(wanted, name)
        assert len(found.codes) == len(wanted.codes)
        for a, b in zip(found.codes, wanted.codes, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == np.uint16


def test_content_hash_ignores_shards_and_sees_codes(tmp_path: Path):
    rows = [clip(n) for n in range(20)]
    one = make(tmp_path / "one", rows).info
    many = make(tmp_path / "many", rows[::-1], rows_per_shard=3).info
    assert one.content_hash == many.content_hash
    rows[7].codes[0][0, 0] = (int(rows[7].codes[0][0, 0]) + 1) % 256
    assert make(tmp_path / "other", rows).info.content_hash != one.content_hash


def test_equal_rows_give_equal_bytes(tmp_path: Path):
    rows = [clip(n) for n in range(20)]
    make(tmp_path / "a", rows)
    make(tmp_path / "b", rows)
    a, b = ([p.read_bytes() for p in list_shards(tmp_path / name)] for name in "ab")
    assert a == b


def test_a_smaller_dataset_replaces_all_shards_of_a_larger_one(tmp_path: Path):
    make(tmp_path, [clip(n) for n in range(20)], rows_per_shard=5)
    assert len(make(tmp_path, [clip(n) for n in range(7)], rows_per_shard=5).ids) == 7


@pytest.mark.parametrize("num_rows, batch_clips", [(37, 8), (5, 8), (64, 8), (100, 7), (3, 1)])
def test_each_epoch_visits_every_row_once(tmp_path: Path, num_rows: int, batch_clips: int):
    order = TrainOrder(
        make(tmp_path, [clip(n) for n in range(num_rows)]), TaskMix(), batch_clips, 3
    )
    num_epochs = 4
    batches = [order.batch(step) for step in range(num_epochs * num_rows // batch_clips + 1)]
    assert {len(batch) for batch in batches} == {batch_clips}
    stream = [row_of(conversation) for batch in batches for conversation in batch]
    epochs = [stream[e * num_rows : (e + 1) * num_rows] for e in range(num_epochs)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"r{n}" for n in range(num_rows))
    if num_rows > 5:
        assert epochs[0] != epochs[1]


def test_a_batch_depends_on_nothing_but_seed_and_step(tmp_path: Path):
    mix = TaskMix(transcribe=1, speak=1, clone=1)
    rows = [clip(n, speaker=f"s{n % 3}") for n in range(40)]
    order = TrainOrder(make(tmp_path, rows), mix, 6, seed=5)
    forward = [[c.key for c in order.batch(step)] for step in range(30)]
    resumed = TrainOrder(Dataset.open(str(tmp_path)), mix, 6, seed=5)
    assert [[c.key for c in resumed.batch(step)] for step in reversed(range(30))] == forward[::-1]
    other = TrainOrder(Dataset.open(str(tmp_path)), mix, 6, seed=6)
    assert [c.key for c in other.batch(0)] != forward[0]


def test_clips_of_similar_length_share_a_batch(tmp_path: Path):
    rows = [clip(n, num_frames=1 + n, text="same") for n in range(512)]
    order = TrainOrder(make(tmp_path, rows), TaskMix(speak=0), 8, seed=0)
    spreads = [np.ptp([len(audio(c, 0)) for c in order.batch(step)]) for step in range(64)]
    assert np.median(spreads) < 64, "a random batch of 8 spans about 400 of 512 lengths"
    firsts = [len(audio(order.batch(step)[0], 0)) for step in range(64)]
    assert np.abs(np.corrcoef(firsts, range(64))[0, 1]) < 0.5, "batches come in random order"


def test_tasks_follow_the_weights_and_change_between_epochs(tmp_path: Path):
    rows = [clip(n, speaker=f"s{n % 4}") for n in range(400)]
    order = TrainOrder(make(tmp_path, rows), TaskMix(transcribe=2, speak=1, clone=1), 10, seed=1)
    stream = [c for step in range(80) for c in order.batch(step)]
    counts = Counter(c.task for c in stream)
    assert counts["transcribe"] / 800 == pytest.approx(0.5, abs=0.06)
    assert counts["speak"] / 800 == pytest.approx(0.25, abs=0.06)
    assert counts["clone"] / 800 == pytest.approx(0.25, abs=0.06)
    first = {row_of(c): c.task for c in stream[:400]}
    second = {row_of(c): c.task for c in stream[400:]}
    assert first != second


def test_clone_refers_to_another_text_of_the_same_speaker_and_split(tmp_path: Path):
    rows = [clip(n, speaker=f"s{n % 3}", text=f"t{n % 7}") for n in range(60)]
    rows += [clip(n, split="validation", speaker="s0") for n in range(60, 80)]
    by_codes = {row.codes[0].tobytes(): row for row in rows}
    order = TrainOrder(make(tmp_path, rows), TaskMix(transcribe=0, speak=0, clone=1), 6, seed=0)
    for step in range(20):
        for conversation in order.batch(step):
            reference = by_codes[audio(conversation, 1).tobytes()]
            target = by_codes[audio(conversation, 3).tobytes()]
            assert reference.speaker == target.speaker
            assert reference.split == "train"
            assert reference.text == text(conversation, 0) != target.text == text(conversation, 2)
            assert [turn.target for turn in conversation.turns] == [False, False, False, True]


def test_clone_prefers_the_reference_of_the_row(tmp_path: Path):
    order = TrainOrder(
        make(tmp_path, [clip(0, ref_text="its own")]), TaskMix(transcribe=0, speak=0, clone=1), 1, 0
    )
    (conversation,) = order.batch(0)
    assert text(conversation, 0) == "its own"
    assert len(audio(conversation, 1)) == 7


def test_a_speaker_with_one_text_or_no_name_is_not_cloned(tmp_path: Path):
    rows = [clip(0, speaker="one"), clip(1, speaker="one", text="text 0")]
    rows += [clip(n, speaker="") for n in range(2, 6)] + [clip(n, speaker="two") for n in (6, 7)]
    dataset = make(tmp_path, rows)
    order = TrainOrder(dataset, TaskMix(transcribe=0, speak=1, clone=99), 8, seed=0)
    cloned = {row_of(c) for s in range(20) for c in order.batch(s) if c.task == "clone"}
    assert cloned == {"r6", "r7"}
    assert TrainOrder(dataset, TaskMix(transcribe=0, speak=0, clone=1), 1, 0).num_skipped == 6


def test_chat_rows_keep_their_turns(tmp_path: Path):
    order = TrainOrder(make(tmp_path, [chat(0)]), TaskMix(), 1, seed=0)
    (conversation,) = order.batch(0)
    assert conversation.task == "chat"
    assert [turn.target for turn in conversation.turns] == [False, False, False, True]
    assert [len(audio(conversation, 1)), len(audio(conversation, 2))] == [3, 4]


def test_rows_over_the_limits_are_skipped_and_counted(tmp_path: Path):
    rows = [clip(n, num_frames=10) for n in range(6)] + [clip(6, num_frames=11)]
    rows += [clip(7, num_frames=10, text="x" * 50)]
    dataset = make(tmp_path, rows)
    order = TrainOrder(dataset, TaskMix(), 2, 0, max_frames=10, max_text=20)
    assert (order.num_rows, order.num_skipped) == (6, 2)
    words = TrainOrder(dataset, TaskMix(), 2, 0, max_text=1, text_length=lambda t: len(t.split()))
    assert words.num_rows == 1
    with pytest.raises(
        DataError, match=r"all 8 rows of the train split are skipped .*max_frames 3"
    ):
        TrainOrder(dataset, TaskMix(), 2, 0, max_frames=3)


def encoded_rows(conversation: Conversation) -> int:
    """What `encode_conversation` makes of it with one id a letter."""
    return encode_conversation(conversation, LETTERWISE).num_rows


def test_the_estimate_of_rows_is_never_below_the_encoded_ones(tmp_path: Path):
    rows = [clip(n) for n in range(5)] + [clip(5, ref_text="a reference"), chat(0)]
    dataset = make(tmp_path, rows)
    for index, kind in enumerate(dataset.kinds):
        row, most = dataset.row(index), dataset.most_rows(index, len)
        if kind == "chat":
            assert encoded_rows(tasks.chat(row)) <= most
            continue
        assert encoded_rows(tasks.transcribe(row)) <= most
        assert most - encoded_rows(tasks.speak(row)) <= 6
        for other in range(5):
            both = most + dataset.most_rows(other, len)
            if row.ref_text is not None:
                both = most + dataset.most_reference_rows(index, len)
            assert encoded_rows(tasks.clone(row, dataset.row(other))) <= both


def test_what_the_base_cannot_hold_is_skipped_before_training(tmp_path: Path):
    rows = [clip(n, speaker="a", num_frames=10) for n in range(6)]
    rows += [clip(6, speaker="a", num_frames=60), clip(7, speaker="a", num_frames=200)]
    rows += [clip(8, speaker="b", num_frames=40, ref_text="r" * 20), chat(0)]
    dataset = make(tmp_path, rows)
    order = TrainOrder(dataset, TaskMix(speak=0, clone=9), 5, seed=0, max_rows=100)
    assert (order.num_rows, order.num_skipped) == (9, 1)
    drawn = [c for step in range(40) for c in order.batch(step)]
    assert max(map(encoded_rows, drawn)) <= 100
    cloned = {row_of(c) for c in drawn if c.task == "clone"}
    assert cloned == {f"r{n}" for n in range(6)}
    alone = TrainOrder(dataset, TaskMix(transcribe=0, speak=0, clone=1), 5, seed=0, max_rows=100)
    assert alone.num_skipped == 3


def test_a_roomy_limit_of_rows_changes_no_batch(tmp_path: Path):
    mix = TaskMix(transcribe=1, speak=1, clone=1)
    dataset = make(tmp_path, [clip(n, speaker=f"s{n % 3}") for n in range(40)])
    free, limited = (TrainOrder(dataset, mix, 6, seed=5, max_rows=n) for n in (None, 2048))
    for step in range(30):
        assert [c.key for c in free.batch(step)] == [c.key for c in limited.batch(step)]


def test_validation_fits_the_base_with_swapped_audio_too(tmp_path: Path):
    rows = [clip(n, "validation", num_frames=10 + n, text="x" * (60 - n)) for n in range(40)]
    dataset = make(tmp_path, [*rows, clip(99)])
    sets = validation_sets(dataset, 40, max_rows=105)
    assert len(sets.transcribe) == 14, "clips of 10 to 23 frames, texts of 60 to 47 letters"
    for conversation in (*sets.transcribe, *sets.transcribe_swapped, *sets.speak):
        assert encoded_rows(conversation) <= 105
    with pytest.raises(DataError, match="has 0 usable clips"):
        validation_sets(dataset, 40, max_rows=30)


def test_validation_swaps_are_a_permutation_with_other_texts_near_in_length(tmp_path: Path):
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


def test_validation_is_spread_over_texts_and_speakers(tmp_path: Path):
    rows = [
        clip(n, "validation", speaker=f"s{n // 40}", text=f"sentence {n % 40}") for n in range(160)
    ]
    sets = validation_sets(make(tmp_path, rows), 20)
    numbers = [int(row_of(c)[1:]) for c in sets.transcribe]
    assert len({n % 40 for n in numbers}) == 20
    assert Counter(n // 40 for n in numbers) == {0: 5, 1: 5, 2: 5, 3: 5}


def test_validation_keeps_no_text_above_half(tmp_path: Path):
    rows = [clip(n, "validation", text="same") for n in range(9)] + [clip(9, "validation")]
    sets = validation_sets(make(tmp_path, rows), 10)
    assert sorted(text(c, 1) for c in sets.transcribe) == ["same", "text 9"]


@pytest.mark.parametrize("texts", [["a"], ["a", "a"], []])
def test_validation_without_two_texts_is_an_error(tmp_path: Path, texts: list[str]):
    rows = [clip(n, "validation", text=t) for n, t in enumerate(texts)] + [clip(9)]
    dataset = make(tmp_path, rows)
    with pytest.raises(DataError, match=f"{len(texts)} usable clips with {len(set(texts))} diff"):
        validation_sets(dataset, 10)


def test_derangement_holds_for_any_texts_without_a_majority():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = int(rng.integers(2, 25))
        texts = [f"t{n}" for n in rng.integers(0, 6, size)]
        if 2 * max(Counter(texts).values()) > size:
            continue
        result = derange(texts, rng.integers(1, 50, size).tolist())
        assert sorted(result) == list(range(size))
        assert all(texts[i] != texts[j] for i, j in enumerate(result))


def test_folders_that_are_no_dataset_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"found no dataset\.json, there is no dataset"):
        Dataset.open(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no such embedded dataset"):
        Dataset.open("embedded:klingon")
    make(tmp_path, [clip(0), clip(1)])
    info = tmp_path / "dataset.json"
    good = json.loads(info.read_text())

    def broken(text: str) -> Dataset:
        info.write_text(text)
        return Dataset.open(str(tmp_path))

    with pytest.raises(DataError, match=r"cannot be read as JSON"):
        broken("{")
    with pytest.raises(DataError, match=r"found dataset format 2, needed 1"):
        broken(json.dumps(good | {"format": 2}))
    with pytest.raises(DataError, match=r"fields are missing or unknown"):
        broken(json.dumps({k: v for k, v in good.items() if k != "splits"}))
    with pytest.raises(DataError, match=r"codec\.num_codebooks is 0"):
        broken(json.dumps(good | {"codec": good["codec"] | {"num_codebooks": 0}}))
    with pytest.raises(DataError, match=r"says 3 rows, the shards hold 2"):
        broken(json.dumps(good | {"num_rows": 3}))
    info.unlink()
    with pytest.raises(DataError, match=r"its preparation was not finished"):
        Dataset.open(str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path):
    make(tmp_path, [clip(0)])
    (shard,) = list_shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(DataError, match=r"part-00000\.parquet: cannot be read as Parquet"):
        Dataset.open(str(tmp_path))
