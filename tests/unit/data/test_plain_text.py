"""Texts that sound the same count as one."""

import pytest

from higgs_tune.data.plain_text import plain_text


@pytest.mark.parametrize(
    "text, plain",
    [
        ("  Hello,  WORLD! ", "hello world"),
        ("مَرْيَمُ تُحَضِّرُ", "مريم تحضر"),
        ("صبـاح الخير.\u200f", "صباح الخير"),
        ("\u0627\u0653ل", "آل"),
        ("ذَٰلِكَ ٱلْكِتَـٰبُ لَا رَيْبَ ۛ فِيهِ ۛ", "ذلك ٱلكتب لا ريب فيه"),
        ("…", ""),
    ],
)
def test_plain_text_drops_what_may_be_left_out(text: str, plain: str):
    assert plain_text(text) == plain
