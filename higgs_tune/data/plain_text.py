"""Texts without what may be written or left out: two that sound the same count as one."""

import re
import unicodedata
from functools import cache

# Optional in writing: vowel signs, tatweel, and what the Quran's text is annotated with.
_ARABIC_MARKS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")


def visible(text: str) -> str:
    """Text without characters that only steer its layout: direction and joining marks, soft hyphens."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def plain_text(text: str) -> str:
    """Text as it sounds: no case, punctuation, Arabic short vowels, invisible marks or doubled spaces.

    Digits of every script are 0 to 9.
    """
    text = _ARABIC_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(map(_kept, text)).split())


def sound_of(text: str) -> str:
    """What texts that sound the same have in common: without spaces, too, as marks in a word leave them."""
    return plain_text(text).replace(" ", "")


@cache  # asked of every letter of a dataset
def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return " " if category[0] in "PZC" else character
