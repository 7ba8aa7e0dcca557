"""Validation rows are drawn so that nothing leaks; added rows move hardly any of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from higgs_tune.data.files import scratch_database
from higgs_tune.data.plain_text import plain_text
from higgs_tune.data.row_table import RowTable
from higgs_tune.data.rows import ManifestRow, Rejection
from higgs_tune.data.splits import divide
from higgs_tune.errors import DataError


def row(
    number: int, text: str, speaker: str = "", split: str | None = None, path: str | None = None
) -> ManifestRow:
    audio = (path or f"{number}.wav",)
    return ManifestRow(number, f"r{number}", split, speaker, None, "clip", text, audio)


def chat(
    number: int,
    *turns: tuple[str, str],
    start: int = 1,
    speaker: str = "",
    split: str | None = None,
) -> ManifestRow:
    """A chat whose turns have one part each; a part that ends in .wav is audio."""
    audio = tuple(part for _, part in turns if part.endswith(".wav"))
    parts = [
        {"type": "audio", "audio": audio.index(part)}
        if part in audio
        else {"type": "text", "text": part}
        for _, part in turns
    ]
    raw = [{"role": role, "parts": [part]} for (role, _), part in zip(turns, parts, strict=True)]
    last = [part for _, part in turns if part not in audio][-1]
    return ManifestRow(
        number, f"r{number}", split, speaker, None, "chat", last, audio,
        turns=json.dumps(raw), start_index=start,
    )  # fmt: skip


def assign_splits(
    rows: list[ManifestRow], val_fraction: float, seed: int, root: Path = Path("/data")
) -> tuple[list[ManifestRow], list[Rejection], str]:
    """The rows with their splits, the rows that are left out, and the rule."""
    with scratch_database() as database:
        table = RowTable(database, root)
        for one in rows:
            table.add(one)
        rule = divide(table, Path("m.csv"), root, val_fraction, seed)
        return list(table.rows()), list(table.rejected()), rule


def texts_of(rows: list[ManifestRow], split: str) -> set[str]:
    return {plain_text(row.text) for row in rows if row.split == split}


def speakers_of(rows: list[ManifestRow], split: str) -> set[str]:
    return {row.speaker for row in rows if row.split == split}


@pytest.mark.parametrize("seed", range(20))
def test_no_text_is_in_both_splits(seed: int):
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


def test_with_enough_speakers_no_speaker_is_in_both_splits():
    rows = [row(n, f"text {n}", f"s{n % 12}") for n in range(240)]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    assert not speakers_of(kept, "train") & speakers_of(kept, "validation")
    assert sum(row.split == "validation" for row in kept) in (20, 40)
    assert not left_out
    assert rule == "drawn with seed 0 for 0.1 of the clips: no speaker and no text is shared"


def test_a_few_validation_clips_with_train_texts_are_left_out():
    rows = [row(n, "Yes." if n < 4 else f"text {n}", f"s{n % 12}") for n in range(240)]
    some = [assign_splits(rows, 0.1, seed) for seed in range(12)]
    assert any(left_out for _, left_out, _ in some)
    for kept, left_out, rule in some:
        assert rule.endswith("no speaker and no text is shared")
        assert not texts_of(kept, "train") & texts_of(kept, "validation")
        assert all("left out: a validation speaker" in one.reason for one in left_out)


def test_speakers_who_all_say_the_same_texts_are_split_by_text():
    rows = [row(n, f"text {n // 8}", f"s{n % 8}") for n in range(400)]
    kept, left_out, rule = assign_splits(rows, 0.1, 3)
    assert not left_out
    assert sum(row.split == "validation" for row in kept) == 40
    assert speakers_of(kept, "validation") == speakers_of(kept, "train")
    assert rule == "drawn with seed 3 for 0.1 of the clips: no text is shared, speakers are"


def test_one_unknown_speaker_makes_the_split_go_by_text():
    rows = [row(n, f"text {n}", f"s{n % 9}" if n else "") for n in range(90)]
    assert assign_splits(rows, 0.1, 0)[2].endswith("no text is shared, speakers are")


def test_added_rows_move_hardly_any_other_row():
    rows = [row(n, f"text {n}") for n in range(400)]
    before = {r.id: r.split for r in assign_splits(rows[:380], 0.1, 0)[0]}
    after = {r.id: r.split for r in assign_splits(rows, 0.1, 0)[0]}
    assert sum(before[name] != after[name] for name in before) <= 4
    assert before != {r.id: r.split for r in assign_splits(rows[:380], 0.1, 1)[0]}


@pytest.mark.parametrize("seed", range(10))
def test_spellings_of_a_sentence_and_rows_of_a_recording_stay_together(seed: int, tmp_path: Path):
    vocalised = [f"كَتَبَ {n}" for n in range(40)]
    rows = [row(n, text) for n, text in enumerate(vocalised)]
    rows += [row(40 + n, plain_text(text) + ".\u200f") for n, text in enumerate(vocalised)]
    rows += [row(80 + n, f"another {n}", path=f"x/../{n}.wav") for n in range(40)]
    rows += [row(120 + n, f"last {n}", path=f"{n % 3}.flac") for n in range(9)]
    (tmp_path / "alias.wav").symlink_to(tmp_path / "7.wav")
    rows += [row(130, "an alias", path=str(tmp_path / "alias.wav"))]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "8.wav").touch()
    rows += [row(131, "as Unix has it", path="x/8.wav"), row(132, "and Windows", path=r"x\8.wav")]
    kept, left_out, _ = assign_splits(rows, 0.2, seed, tmp_path)
    assert not left_out
    sides = [one.split for one in kept]
    assert sides[:40] == sides[40:80] == sides[80:120]
    assert sides[7] == sides[-3]
    assert sides[-2] == sides[-1]
    assert all(sides[120 + n] == sides[120 + n % 3] for n in range(9))
    assert 0.1 < sides.count("validation") / len(sides) < 0.3


@pytest.mark.parametrize("marked, bare", [("U.S.", "US"), ("e-mail", "email"), ("你好,", "你好")])
def test_texts_that_differ_only_in_punctuation_stay_together(marked: str, bare: str):
    rows = [row(n, f"{(bare, marked)[n % 2]}世界 {n // 2}") for n in range(40)]
    kept, _, _ = assign_splits(rows, 0.2, 0)
    sides = [one.split for one in kept]
    assert sides[::2] == sides[1::2]
    assert {"train", "validation"} == set(sides)


def test_clips_linked_in_a_long_chain_stay_together():
    rows = [row(n, f"text {n // 2}", path=f"{(n + 1) // 2}.wav") for n in range(200)]
    rows += [row(200 + n, f"other {n}") for n in range(2)]
    kept, _, _ = assign_splits(rows, 0.5, 0)
    assert len({one.split for one in kept[:200]}) == 1


@pytest.mark.parametrize("seed", range(10))
def test_a_chat_that_teaches_a_validation_text_or_recording_is_left_out(seed: int):
    texts = [f"جُمْلَة {n}" for n in range(30)]
    rows = [row(n, text) for n, text in enumerate(texts)]
    for n in range(0, 30, 3):
        a, b, c = (plain_text(text) + "!" for text in texts[n : n + 3])
        many = [("user", a), ("assistant", f"a{n}.wav"), ("user", f"b{n}.wav"), ("assistant", b)]
        rows.append(chat(100 + n, *many))
        rows.append(chat(200 + n, *many, start=3))
        rows.append(chat(300 + n, ("user", f"{n + 2}.wav"), ("assistant", f"It says {n}.")))
        rows.append(
            chat(400 + n, ("system", a), ("user", "x"), ("assistant", f"x{n}.wav"), start=2)
        )
        rows.append(chat(500 + n, ("user", c), ("assistant", f"c{n}.wav")))
    kept, left_out, rule = assign_splits(rows, 0.2, seed)
    assert rule.endswith("for 0.2 of the clips: no text is shared, speakers are")
    held = {one.number for one in kept if one.split == "validation"}
    assert len(held) == 6 and max(held) < 30
    wanted = {100 + n for n in range(0, 30, 3) if {n, n + 1} & held}
    wanted |= {200 + n for n in range(0, 30, 3) if n + 1 in held}
    wanted |= {base + n for n in range(0, 30, 3) for base in (300, 500) if n + 2 in held}
    assert {one.row for one in left_out} == wanted
    reason = "left out: a chat that teaches a text or recording of a validation clip"
    assert {one.reason for one in left_out} == {reason}


def test_chats_of_held_out_speakers_are_left_out():
    rows = [row(n, f"text {n}", f"s{n % 12}") for n in range(240)]
    rows += [
        chat(300 + n, ("user", f"say {n}"), ("assistant", f"c{n}.wav"), speaker=f"s{n}")
        for n in range(12)
    ]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    held = speakers_of(kept, "validation")
    assert held and not held & speakers_of(kept, "train")
    assert {f"s{one.row - 300}" for one in left_out} == held
    assert {one.reason for one in left_out} == {"left out: a chat of a validation speaker"}
    assert rule.endswith("no speaker and no text is shared")


def test_without_clips_all_chats_train_and_a_warning_names_the_option(
    caplog: pytest.LogCaptureFixture,
):
    rows = [chat(n, ("user", f"text {n}"), ("assistant", f"{n}.wav")) for n in range(24)]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    assert {one.split for one in kept} == {"train"} and not left_out
    assert rule == "all rows train: chats do not validate"
    (warning,) = caplog.messages
    assert warning.startswith("m.csv: found 0 different texts of clips for validation, needed 2")
    assert "--clips-from-chat" in warning


def test_a_given_split_is_kept_and_its_shared_texts_counted(caplog: pytest.LogCaptureFixture):
    rows = [
        row(0, "a", split="train"),
        row(1, "A.", split="validation"),
        chat(
            2,
            ("user", "b"),
            ("assistant", "2.wav"),
            ("user", "c"),
            ("assistant", "4.wav"),
            split="train",
        ),
        row(3, "b", split="validation"),
        row(4, "d", split="validation"),
        row(5, "e", split="validation"),
        chat(6, ("user", "a"), ("assistant", "6.wav"), split="validation"),
    ]
    kept, left_out, rule = assign_splits(rows, 0.1, 0)
    assert (kept, left_out, rule) == (rows, [], "given by the manifest's split column")
    (warning,) = caplog.messages
    assert "m.csv: 2 texts and 1 recordings are in both splits, as its" in warning


def test_a_given_split_without_two_validation_texts_gives_a_warning(
    caplog: pytest.LogCaptureFixture,
):
    rows = [row(n, f"text {n}", split="validation" if n == 3 else "train") for n in range(9)]
    assign_splits(rows, 0.1, 0)
    (warning,) = caplog.messages
    assert "found 1 different texts of clips for validation, needed 2" in warning


def test_a_split_for_only_some_rows_is_an_error():
    rows = [row(0, "a", split="train"), row(1, "b")]
    with pytest.raises(
        DataError, match=r"m\.csv: row 1 \(id 'r1'\) has no split, 1 of 2 rows have one"
    ):
        assign_splits(rows, 0.1, 0)


def test_too_few_texts_to_split_are_an_error_unless_all_rows_train():
    rows = [row(n, f"text {n % 2}") for n in range(9)]
    with pytest.raises(DataError, match=r"m\.csv: found 2 different texts of clips, needed at"):
        assign_splits(rows, 0.1, 0)
    kept, _, rule = assign_splits(rows, 0, 0)
    assert kept == [replace(r, split="train") for r in rows]
    assert rule == "all rows train"


def test_a_speaker_with_most_of_the_chats_is_not_held_out(caplog):
    rows = [row(n, f"text {n}", f"s{n % 10}") for n in range(100)]
    rows += [
        chat(100 + n, ("user", f"c{n}.wav"), ("assistant", f"chat {n}"), speaker="s3")
        for n in range(200)
    ]
    for seed in range(20):
        kept, _, _ = assign_splits(rows, 0.1, seed)
        assert sum(one.kind == "chat" for one in kept) == 200
    assert "chats are left out" not in caplog.text


def test_a_clip_without_letters_excludes_no_chat(caplog):
    rows = [row(n, "..." if n == 20 else f"text {n}") for n in range(21)]
    rows += [chat(100 + n, ("user", f"c{n}.wav"), ("assistant", "…"), start=1) for n in range(30)]
    for seed in range(40):
        kept, _, _ = assign_splits(rows, 0.2, seed)
        assert sum(one.kind == "chat" for one in kept) == 30


def test_left_out_chats_give_a_warning(caplog):
    rows = [row(n, f"text {n}") for n in range(10)]
    rows += [
        chat(100, ("user", "x.wav"), ("assistant", "text 0")),
        *(chat(101 + n, ("user", "y.wav"), ("assistant", f"text {n}")) for n in range(1, 10)),
    ]
    assign_splits(rows, 0.2, 0)
    assert "of 10 chats are left out: they are of validation speakers, or teach" in caplog.text


def test_validation_size_is_as_near_the_target_as_whole_texts_allow():
    rows = [row(n, f"text {n // 3}") for n in range(81)]
    kept, _, _ = assign_splits(rows, 0.1, 0)
    assert sum(one.split == "validation" for one in kept) == 9, "the target is 8.1, a text has 3"


def test_a_large_fraction_leaves_one_text_to_train():
    kept, _, _ = assign_splits([row(n, f"text {n}") for n in range(4)], 0.95, 0)
    assert len(texts_of(kept, "train")) == 1


def test_speakers_who_share_many_texts_are_split_by_text():
    rows = [
        row(n, f"text {n % 20}" if n % 20 < 8 else f"own {n}", f"s{n // 20}") for n in range(240)
    ]
    for seed in range(10):
        kept, left_out, rule = assign_splits(rows, 0.1, seed)
        assert rule.endswith("no text is shared, speakers are"), "a speaker's 8 of 240 exceed 2 %"
        assert len(kept) == 240 and not left_out
