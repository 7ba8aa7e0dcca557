"""Ordinary Arabic sentences, built from parts that were written for this, with their vowel signs.

The signs were set by hand because `text2tashkeel` 0.1.0 put wrong ones on four of nine trial sentences
(al-mudrasa, akhti, al-qatta, ahibbu), and espeak-ng speaks what is written.
"""

# ruff: noqa: SIM905 - lists of words read better as text
import itertools
import random
import unicodedata
from collections.abc import Sequence

_HE = (
    "الوَلَدُ أَخِي أَبِي جَدِّي صَدِيقِي جَارُنَا المُعَلِّمُ الطَّبِيبُ الطَّالِبُ عَمِّي خَالِي المُدِيرُ الضَّيْفُ السَّائِقُ أَحْمَدُ يُوسُفُ"
).split()
_SHE = (
    "البِنْتُ أُخْتِي أُمِّي جَدَّتِي صَدِيقَتِي جَارَتُنَا المُعَلِّمَةُ الطَّبِيبَةُ الطَّالِبَةُ عَمَّتِي خَالَتِي المُدِيرَةُ لَيْلَى سَلْمَى مَرْيَمُ"
).split()
_FOOD = (
    "الخُبْزَ الجُبْنَ التَّمْرَ السَّمَكَ الأُرْزَ العَسَلَ التُّفَّاحَ البُرْتُقَالَ اللَّحْمَ الحِسَاءَ البَيْضَ العِنَبَ السَّلَطَةَ"
).split()
_DRINKS = "القَهْوَةَ الشَّايَ الحَلِيبَ العَصِيرَ المَاءَ".split()
_TEXTS = "الرِّسَالَةَ القِصَّةَ الدَّرْسَ المَقَالَ الخَبَرَ الكِتَابَ".split()
_THINGS = ("السَّيَّارَةَ الدَّرَّاجَةَ السَّاعَةَ الهَاتِفَ الحَقِيبَةَ البَابَ النَّافِذَةَ الكُرْسِيَّ الطَّاوِلَةَ المِصْبَاحَ").split()
_PLACES = (
    "المَدْرَسَةِ السُّوقِ المَكْتَبِ البَحْرِ المَطَارِ الحَدِيقَةِ القَرْيَةِ المَدِينَةِ المُسْتَشْفَى المَطْعَمِ المَحَطَّةِ المَكْتَبَةِ"
).split()
_WHEN = ["اليَوْمَ", "كُلَّ يَوْمٍ", "أَحْيَانًا", "كَثِيرًا", "قَلِيلًا", "فِي الصَّبَاحِ", "فِي المَسَاءِ", "بِهُدُوءٍ"]
# Verbs of the third person masculine; the feminine changes the first letter.
_VERBS_AND_OBJECTS: list[tuple[Sequence[str], Sequence[str]]] = [
    ("يَأْكُلُ يُحَضِّرُ يَشْتَرِي يُحِبُّ يُرِيدُ".split(), _FOOD),
    ("يَشْرَبُ يُحَضِّرُ يُفَضِّلُ".split(), _DRINKS),
    ("يَقْرَأُ يَكْتُبُ يَفْهَمُ".split(), _TEXTS),
    ("يُنَظِّفُ يُصْلِحُ يَبِيعُ".split(), _THINGS),
    (["يَذْهَبُ إِلَى", "يَعُودُ مِنَ", "يَصِلُ إِلَى"], _PLACES),
    (["يَجْلِسُ فِي", "يَعْمَلُ فِي", "يَنْتَظِرُ فِي"], [p for p in _PLACES if p != "البَحْرِ"]),
    ("يَنَامُ يَضْحَكُ يَدْرُسُ يَسْبَحُ يَمْشِي يَلْعَبُ".split(), _WHEN),
]
_NOMINAL: list[tuple[Sequence[str], Sequence[str]]] = [
    (
        "البَيْتُ الشَّارِعُ الفُنْدُقُ المَطْعَمُ المَكْتَبُ المَطْبَخُ".split(),
        "كَبِيرٌ صَغِيرٌ قَرِيبٌ بَعِيدٌ نَظِيفٌ هَادِئٌ مُزْدَحِمٌ".split(),
    ),
    (
        "الغُرْفَةُ المَدِينَةُ الحَدِيقَةُ المَدْرَسَةُ القَرْيَةُ المَحَطَّةُ".split(),
        "كَبِيرَةٌ صَغِيرَةٌ قَرِيبَةٌ بَعِيدَةٌ نَظِيفَةٌ هَادِئَةٌ جَمِيلَةٌ".split(),
    ),
    (["الطَّقْسُ", "الهَوَاءُ", "الجَوُّ"], ["بَارِدٌ اليَوْمَ", "حَارٌّ اليَوْمَ", "لَطِيفٌ اليَوْمَ"]),
    (
        ["أَيْنَ"],
        [
            "مِفْتَاحُ البَيْتِ", "كِتَابُ أَخِي", "مَحَطَّةُ القِطَارِ", "سَيَّارَةُ أَبِي", "حَقِيبَةُ أُمِّي", "بَابُ الحَدِيقَةِ",
            "مَكْتَبُ المُدِيرِ", "غُرْفَةُ الضَّيْفِ", "سُوقُ السَّمَكِ", "قَلَمُ المُعَلِّمِ",
        ],
    ),
    (
        ["مَتَى"],
        [
            "يَصِلُ القِطَارُ", "يَبْدَأُ الدَّرْسُ", "يُفْتَحُ السُّوقُ", "تَعُودُ أُخْتِي", "نَأْكُلُ العَشَاءَ", "يَنْتَهِي الفِيلْمُ",
            "تُغْلَقُ المَكْتَبَةُ", "نُسَافِرُ إِلَى البَحْرِ",
        ],
    ),
    ("أُرِيدُ أُحِبُّ سَأَشْتَرِي".split(), _FOOD + _DRINKS),
    (["هَلْ تُرِيدُ", "هَلْ تُحِبُّ", "لَا أُرِيدُ"], _FOOD + _DRINKS),
    (["سَأَذْهَبُ إِلَى", "رَجَعْنَا مِنَ", "نَسْكُنُ قُرْبَ"], _PLACES),
]  # fmt: skip
_SAYINGS = [
    "شُكْرًا جَزِيلًا", "صَبَاحَ الخَيْرِ", "مَسَاءَ النُّورِ", "إِلَى اللِّقَاءِ", "كَيْفَ حَالُكَ اليَوْمَ", "أَنَا بِخَيْرٍ", "تَفَضَّلْ بِالجُلُوسِ",
    "رِحْلَةً سَعِيدَةً", "كَمْ ثَمَنُ هَذَا", "لَا أَعْرِفُ الطَّرِيقَ", "أَنَا جَائِعٌ جِدًّا", "هَذَا صَحِيحٌ", "نَلْتَقِي غَدًا", "السَّاعَةُ التَّاسِعَةُ",
    "عِيدُ مِيلَادٍ سَعِيدٌ", "أَهْلًا وَسَهْلًا", "الحِسَابُ مِنْ فَضْلِكَ", "أَشْعُرُ بِالبَرْدِ", "عِنْدِي سُؤَالٌ", "القَمَرُ جَمِيلٌ اللَّيْلَةَ",
]  # fmt: skip


def sentences(num: int, seed: int) -> list[str]:
    """Return `num` different sentences in NFC, or all there are; one of each kind in turn while it lasts."""
    rng = random.Random(seed)
    kinds = [list(_SAYINGS)]
    for verbs, objects in _VERBS_AND_OBJECTS:
        he = [" ".join(parts) for parts in itertools.product(_HE, verbs, objects)]
        feminine = ["ت" + verb[1:] for verb in verbs]
        she = [" ".join(parts) for parts in itertools.product(_SHE, feminine, objects)]
        kinds.append(he + she)
    kinds += [[" ".join(parts) for parts in itertools.product(a, b)] for a, b in _NOMINAL]
    for kind in kinds:
        rng.shuffle(kind)
    chosen: list[str] = []
    while len(chosen) < num and any(kinds):
        for kind in kinds:
            if kind:
                chosen.append(unicodedata.normalize("NFC", kind.pop()))
    return chosen[:num]
