"""Check texts, and normalise them, so that two that sound the same compare as equal."""

import re
import unicodedata
from functools import cache

# Optional in writing: vowel signs, tatweel, and the annotation signs of the Quran.
_ARABIC_MARKS = re.compile(
    "[\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0640\u0898-\u089f\u08ca-\u08ff]"
)
# Letters that writers and keyboards interchange: alef with a hamza, madda or wasla, a final yeh without
# dots, and the Persian yeh and kaf. Arabic speech recognition is scored in this way.
_ARABIC_LETTERS = str.maketrans(
    "\u0623\u0625\u0622\u0671\u0649\u06cc\u06a9", "\u0627\u0627\u0627\u0627\u064a\u064a\u0643"
)


def visible(text: str) -> str:
    """Text without characters that only control layout: direction and joining marks, soft hyphens."""
    return "".join(character for character in text if unicodedata.category(character) != "Cf")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a text: not if Python read it from other bytes, in a name or argument."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plain_text(text: str) -> str:
    """Text without case, punctuation, Arabic short vowels, invisible marks or repeated spaces.

    Digits of every script become 0 to 9; all forms of alef become one, as do those of yeh and of kaf.
    """
    text = _ARABIC_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = text.translate(_ARABIC_LETTERS)
    return " ".join("".join(map(_kept, text)).split())


def sound_of(text: str) -> str:
    """A key equal for texts that sound the same. Spaces go too: punctuation inside a word leaves one."""
    return plain_text(text).replace(" ", "")


@cache  # called for every letter of a dataset
def _kept(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    return " " if category[0] in "PZC" else character
