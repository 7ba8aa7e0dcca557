"""Distances and error rates against references that can be checked by eye."""

import itertools
import math
from unicodedata import normalize

import numpy as np
import pytest
import torch

from higgs_tune.listen.measures import (
    cepstra,
    character_error_rate,
    dynamic_time_warping,
    log_mel,
    mel_distance,
)

RATE = 24_000


def sound(seed: int, seconds: float = 0.5) -> np.ndarray:
    """A rising tone with noise, well above the floor."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = 150 + 400 * seed
    tone = np.sin(2 * np.pi * np.cumsum(pitch * (1 + 0.5 * time)) / RATE)
    return (0.3 * tone + 0.1 * rng.standard_normal(len(time))).astype(np.float32)


def paths(num_a: int, num_b: int):
    """Every monotone path from corner to corner."""
    if (num_a, num_b) == (1, 1):
        yield [(0, 0)]
        return
    for da, db in itertools.product((0, 1), (0, 1)):
        if (da or db) and num_a - da >= 1 and num_b - db >= 1:
            for path in paths(num_a - da, num_b - db):
                yield [*path, (num_a - 1, num_b - 1)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (4, 4), (3, 5), (5, 2)])
def test_warping_finds_the_cheapest_of_all_paths(shape):
    cost = np.random.default_rng(sum(shape)).random(shape)
    best = min(paths(*shape), key=lambda path: sum(cost[cell] for cell in path))
    total, num_steps = dynamic_time_warping(cost)
    assert total == pytest.approx(sum(cost[cell] for cell in best), rel=1e-12)
    assert num_steps == len(best)


def test_cepstra_are_a_cosine_sum_over_the_mel_bands_in_decibels():
    mel = log_mel(sound(1), RATE).numpy().astype(np.float64)
    band = np.arange(80)
    for k in (1, 7, 13):
        basis = math.sqrt(2 / 80) * np.cos(math.pi / 80 * (band + 0.5) * k)
        expected = 20 / math.log(10) / math.sqrt(80) * mel @ basis
        np.testing.assert_allclose(cepstra(sound(1), RATE)[:, k - 1], expected, atol=1e-3)


def tones(*parts: tuple[float, float]) -> np.ndarray:
    """Sine tones of these (Hz, seconds), one after another."""
    waves = [np.sin(2 * np.pi * hz * np.arange(round(s * RATE)) / RATE) for hz, s in parts]
    return np.concatenate(waves).astype(np.float32)


def test_the_distance_ignores_loudness_and_tempo_but_not_another_sound():
    wave = sound(1)
    assert mel_distance(wave, wave, RATE) == 0
    assert mel_distance(0.5 * wave, wave, RATE) == pytest.approx(0, abs=1e-3)
    slow, fast = tones((300, 0.6), (2000, 0.2)), tones((300, 0.2), (2000, 0.5))
    other = mel_distance(tones((300, 0.6), (900, 0.2)), fast, RATE)
    assert mel_distance(slow, fast, RATE) < 0.1 * other


def test_there_is_no_distance_to_a_clip_without_samples():
    assert mel_distance(np.zeros(0, np.float32), sound(1), RATE) is None


@pytest.mark.parametrize(
    ("text", "rate"), [("abcd", 0), ("abd", 0.25), ("abxd", 0.25), ("", 1), ("abcdabcdabcd", 2)]
)
def test_the_error_rate_counts_edits_per_character_of_the_target(text, rate):
    assert character_error_rate(text, "abcd") == rate


def test_error_rate_ignores_mark_orders_that_unicode_takes_as_equal():
    shadda_first = "مُحَم\u0651\u064eدٌ"
    assert character_error_rate(normalize("NFC", shadda_first), shadda_first) == 0
    assert character_error_rate(shadda_first, normalize("NFD", "آمين")) > 0
    assert character_error_rate("", "\u0627\u0653") == 1


def test_mel_frames_come_every_ten_milliseconds():
    assert log_mel(sound(1, 0.5), RATE).shape == torch.Size([51, 80])
