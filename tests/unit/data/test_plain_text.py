"""Texts that sound the same count as one."""

import pytest

from higgs_tune.data.plain_text import plain_text, sound_of, visible


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  Hello,  WORLD! ", "hello world"),
        ("مَرْيَمُ تُحَضِّرُ", "مريم تحضر"),
        ("صبـاح الخير.\u200f", "صباح الخير"),
        ("\u0627\u0653ل آل", "ال ال"),
        ("أَحْمَدُ إِلَى", "احمد الي"),
        ("مسؤول مسائل", "مسؤول مسائل"),
        ("\u06a9تاب\u06cc", "\u0643تاب\u064a"),
        ("ذَٰلِكَ ٱلْكِتَـٰبُ لَا رَيْبَ ۛ فِيهِ ۛ", "ذلك الكتب لا ريب فيه"),
        ("قُلْ ٣ مرات، ۱۲", "قل 3 مرات 12"),
        ("…", ""),
    ],
)
def test_plain_text_drops_what_may_be_left_out(text: str, plain: str):
    assert plain_text(text) == plain


@pytest.mark.parametrize("mark", ["\u00ad", "\u200c", "\u200d", "\u200f", "\u202b", "\ufeff"])
def test_invisible_marks_inside_a_word_are_no_space(mark: str):
    assert plain_text(f"كتا{mark}ب") == "كتاب"
    assert visible(f"{mark}كتا{mark}ب") == "كتاب"


@pytest.mark.parametrize("text", ["U.S.", "e-mail,", "«don’t»", "你好,世界", "مدرسه\u200cها"])
def test_a_text_sounds_the_same_without_the_marks_inside_its_words(text: str):
    assert sound_of(text) == sound_of("".join(filter(str.isalpha, text)))
