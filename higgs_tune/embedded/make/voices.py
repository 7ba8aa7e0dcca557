"""Voices of espeak-ng: variants that sound clearly different, each of them in one role only."""

# ruff: noqa: SIM905 - lists of words read better as text
import random
from collections.abc import Sequence

from higgs_tune.embedded.make.espeak import Voice

ARABIC_TRAIN = (
    Voice("Alicia", pitch=55, rate=225),
    Voice("Andy", pitch=45, rate=215),
    Voice("Lee", pitch=35, rate=230),
    Voice("f5", pitch=60, rate=220),
    Voice("travis", pitch=45, rate=210),
    Voice("Annie", pitch=50, rate=230),
    Voice("norbert", pitch=30, rate=220),
    Voice("sandro", pitch=50, rate=225),
)
ARABIC_VALIDATION = (
    Voice("shelby", pitch=50, rate=220),
    Voice("Denis", pitch=40, rate=220),
    Voice("klatt4", pitch=60, rate=225),
)
# Each of these speaks at two pitches and rates.
_PRETRAIN_VARIANTS = (
    "Alex Andrea Gene Henrique Hugo Jacky Marco Mario Michael Mike Nguyen Reed RicishayMax Storm "
    "Tweaky anika antonio aunty belinda boris caleb david ed edward f1 f2 f3 gustave ian iven "
    "iven2 john klatt klatt6 linda m1 m4 m6 m8 max michel mike2 pablo pedro quincy rob steph zac"
).split()
_PRETRAIN_VALIDATION_VARIANTS = "f4 m2 m7 marcelo grandma paul".split()


def pretraining_voices() -> tuple[tuple[Voice, ...], tuple[Voice, ...]]:
    """Voices of the training and of the validation split."""
    rng = random.Random(0)

    def spread(variants: Sequence[str]) -> tuple[Voice, ...]:
        return tuple(
            Voice(variant, pitch=base + rng.randint(-8, 8), rate=rng.randint(175, 225))
            for variant in variants
            for base in (32, 62)
        )

    return spread(_PRETRAIN_VARIANTS), spread(_PRETRAIN_VALIDATION_VARIANTS)
