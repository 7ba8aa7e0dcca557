"""Texts without what may be written or left out: two that sound the same count as one."""

import re
import unicodedata
from functools import cache

# Optional in writing: vowel signs, tatweel, and what the Quran's text is annotated with.
_ARABIC_MARKS = re.compile("[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640]")
# Letters that writers and keyboards exchange: alef with a hamza, madda or wasla, a final yeh without
# dots, and the Persian yeh and kaf. Recognisers of Arabic are scored so.
_ARABIC_LETTERS = str.maketrans(
    "\u0623\u0625\u0622\u0671\u0649\u06cc\u06a9", "\u0627\u0627\u0627\u0627\u064a\u064a\u0643"
)


def visible(text: str) -> str:
    """Text without characters that only steer its layout: direction and joining marks, soft hyphens."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def plain_text(text: str) -> str:
    """Text as it sounds: no case, punctuation, Arabic short vowels, invisible marks or doubled spaces.

    Digits of every script are 0 to 9; all forms of alef are one, and so are those of yeh and of kaf.
    """
    text = _ARABIC_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate(_ARABIC_LETTERS)
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
