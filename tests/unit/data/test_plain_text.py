"""Texts that sound the same are treated as equal."""

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
        ("هُد\u08f0ى، عَلِيمٌ\u08d6", "هدي عليم"),
        ("قُلْ ٣ مرات، ۱۲", "قل 3 مرات 12"),
        ("…", ""),
    ],
)
def test_plain_text_normalises_case_marks_letters_and_digits(text: str, plain: str):
    assert plain_text(text) == plain


@pytest.mark.parametrize("mark", ["\u00ad", "\u200c", "\u200d", "\u200f", "\u202b", "\ufeff"])
def test_invisible_marks_do_not_split_a_word(mark: str):
    assert plain_text(f"كتا{mark}ب") == "كتاب"
    assert visible(f"{mark}كتا{mark}ب") == "كتاب"


@pytest.mark.parametrize("text", ["U.S.", "e-mail,", "«don’t»", "你好,世界", "مدرسه\u200cها"])
def test_sound_of_a_text_ignores_punctuation_and_invisible_marks(text: str):
    assert sound_of(text) == sound_of("".join(filter(str.isalpha, text)))
