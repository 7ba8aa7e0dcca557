"""The order of training."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.config import DataSettings
from higgs_tune.config_data import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.order import TrainOrder
from higgs_tune.errors import DataError
from tests.unit.data.rows import audio, chat, clip, encoded_rows, make, row_of, text


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
    assert order.epochs(len(batches)) == len(stream) / num_rows
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"r{n}" for n in range(num_rows))
    if num_rows > 5:
        assert epochs[0] != epochs[1]


def test_a_batch_depends_only_on_seed_and_step(tmp_path: Path):
    mix = TaskMix(transcribe=1, speak=1, clone=1)
    rows = [clip(n, speaker=f"s{n % 3}") for n in range(40)]
    order = TrainOrder(make(tmp_path, rows), mix, 6, seed=5)
    forward = [[c.key for c in order.batch(step)] for step in range(30)]
    resumed = TrainOrder(Dataset.open(str(tmp_path)), mix, 6, seed=5)
    assert [[c.key for c in resumed.batch(step)] for step in reversed(range(30))] == forward[::-1]
    other = TrainOrder(Dataset.open(str(tmp_path)), mix, 6, seed=6)
    assert [c.key for c in other.batch(0)] != forward[0]


def test_clips_of_similar_length_share_a_batch_in_every_epoch(tmp_path: Path):
    rows = [clip(n, num_frames=1 + n, text="same") for n in range(515)]  # 64 batches and 3 clips
    order = TrainOrder(make(tmp_path, rows), TaskMix(speak=0), 8, seed=0)
    spreads = [np.ptp([len(audio(c, 0)) for c in order.batch(step)]) for step in range(126)]
    for epoch in (spreads[:64], spreads[66:]):
        assert np.median(epoch) < 64, "a random batch of 8 spans about 400 of 515 lengths"
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


def test_clone_references_have_another_text_but_the_same_speaker_and_split(tmp_path: Path):
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


def test_clone_uses_the_rows_own_reference_if_it_has_one(tmp_path: Path):
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


def test_no_clone_is_prompted_with_the_recording_it_learns(tmp_path: Path):
    only_clones = TaskMix(transcribe=0, speak=0, clone=1)
    twice = [clip(n // 2, speaker="s") for n in range(6)]  # each recording with two texts
    rows = [replace(row, id=f"r{n}", text=f"text {n}") for n, row in enumerate(twice)]
    rows += [replace(clip(9, ref_text="its own", speaker="t"), codes=2 * clip(9).codes)]
    order = TrainOrder(make(tmp_path, rows), only_clones, 1, 0)
    drawn = [c for step in range(20 * order.num_rows) for c in order.batch(step)]
    clones = [c for c in drawn if c.task == "clone"]
    assert {row_of(c) for c in clones} == {f"r{n}" for n in range(6)}
    assert not any(np.array_equal(audio(c, 1), audio(c, 3)) for c in clones)
    assert {c.task for c in drawn if row_of(c) == "r9"} == {"speak"}


def test_chat_rows_keep_their_turns(tmp_path: Path):
    order = TrainOrder(make(tmp_path, [chat(0)]), TaskMix(), 1, seed=0)
    (conversation,) = order.batch(0)
    assert conversation.task == "chat"
    assert [turn.target for turn in conversation.turns] == [False, False, False, True]
    assert [len(audio(conversation, 1)), len(audio(conversation, 2))] == [3, 4]
    learnt = [
        [turn.target for turn in tasks.chat(replace(chat(0), start_index=start)).turns]
        for start in range(4)
    ]
    assert learnt == 2 * [[False, True, False, True]] + 2 * [[False, False, False, True]]


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


def test_estimated_rows_are_an_upper_bound_of_encoded_rows(tmp_path: Path):
    rows = [clip(n) for n in range(5)] + [clip(5, ref_text="a reference"), chat(0)]
    dataset = make(tmp_path, rows)
    sizes = dataset.sizes(len)
    for index, most in enumerate(sizes["rows"]):
        row = dataset.row(index)
        if row.kind == "chat":
            assert encoded_rows(tasks.chat(row)) <= most
            continue
        assert encoded_rows(tasks.transcribe(row)) <= most
        assert most - encoded_rows(tasks.speak(row)) <= 6
        for other in range(5):
            both = most + sizes["rows"][other]
            if row.ref_text is not None:
                both = most + sizes["reference_rows"][index]
            assert encoded_rows(tasks.clone(row, dataset.row(other))) <= both


def test_longest_conversation_allows_for_cloning_the_longest_clips():
    data = DataSettings(max_frames=60, max_text_tokens=20, system_text=40 * "s")
    one, other = (clip(number, num_frames=60, text=20 * "x") for number in range(2))
    rows = encoded_rows(tasks.with_system_turn(tasks.clone(one, other), data.system_text))
    assert rows <= tasks.longest_conversation(data, 2, positions=1000) <= 1.1 * rows
    assert tasks.longest_conversation(data, 2, positions=100) == 100


def test_rows_too_long_for_the_base_are_skipped_before_training(tmp_path: Path):
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


def test_a_generous_limit_of_rows_changes_no_batch(tmp_path: Path):
    mix = TaskMix(transcribe=1, speak=1, clone=1)
    dataset = make(tmp_path, [clip(n, speaker=f"s{n % 3}") for n in range(40)])
    free, limited = (TrainOrder(dataset, mix, 6, seed=5, max_rows=n) for n in (None, 2048))
    for step in range(30):
        assert [c.key for c in free.batch(step)] == [c.key for c in limited.batch(step)]


def test_the_reference_is_drawn_independently_of_the_task(tmp_path: Path):
    rows = [clip(n, speaker="one") for n in range(40)]
    mix = TaskMix(transcribe=1, speak=1, clone=1)  # clone takes the upper third of the draws
    order = TrainOrder(make(tmp_path, rows), mix, 8, seed=0)
    drawn = [c for step in range(100) for c in order.batch(step) if c.task == "clone"]
    heard = [int(text(c, 0).split()[1]) for c in drawn]
    assert np.mean([number < 20 for number in heard]) == pytest.approx(0.5, abs=0.12)


def test_clones_are_batched_by_the_total_length_of_both_clips(tmp_path: Path):
    rows = [clip(2 * n, speaker=f"s{n}", num_frames=10, text="same") for n in range(512)]
    rows += [
        clip(2 * n + 1, "train", f"s{n}", "diff", num_frames=2 + n) for n in range(512)
    ]  # fmt: skip
    order = TrainOrder(make(tmp_path, rows), TaskMix(transcribe=0, speak=0, clone=1), 8, seed=0)
    totals = [
        [len(audio(c, 1)) + len(audio(c, 3)) for c in order.batch(step)] for step in range(128)
    ]
    assert np.median([np.ptp(batch) for batch in totals]) < 64, "totals are 12 to 523"


def test_rows_exactly_at_a_limit_are_kept(tmp_path: Path):
    clones = TaskMix(transcribe=0, speak=0, clone=1)
    one = make(tmp_path / "one", [clip(0, num_frames=7, text="x" * 9, ref_text="r" * 12)])
    whole = int(one.sizes(len)["rows"][0] + one.sizes(len)["reference_rows"][0])
    for limit, most in (("max_frames", 7), ("max_text", 12), ("max_rows", whole)):
        assert TrainOrder(one, clones, 1, 0, **{limit: most}).num_rows == 1
        with pytest.raises(DataError, match="all 1 rows of the train split are skipped"):
            TrainOrder(one, clones, 1, 0, **{limit: most - 1})
    alone = int(one.sizes(len)["rows"][0])
    assert TrainOrder(one, TaskMix(), 1, 0, max_rows=alone).num_rows == 1
    with pytest.raises(DataError, match="all 1 rows of the train split are skipped"):
        TrainOrder(one, TaskMix(), 1, 0, max_rows=alone - 1)
