"""Which clips validation uses, and whose audio each one is swapped with."""

from collections import Counter

import numpy as np

from higgs_tune.data.plain_text import plain_text


def spread(texts: np.ndarray, speakers: np.ndarray, count: int, seed: int) -> list[int]:
    """Places of up to `count` clips: least used text first, then speaker, then at random.

    No text fills more than half, so that each clip has one with another text to swap with. Equal texts
    and speakers are equal numbers; which ones does not matter.
    """
    if not len(texts):
        return []
    order = np.random.default_rng(seed).permutation(len(texts))
    _, text = np.unique(texts[order], return_inverse=True)
    _, speaker = np.unique(speakers[order], return_inverse=True)
    text_uses, speaker_uses = np.zeros(len(order)), np.zeros(len(order))
    taken = np.zeros(len(order), dtype=bool)
    chosen: list[int] = []
    for _ in range(min(count, len(order))):
        cost = text_uses[text] * (len(order) + 1) + speaker_uses[speaker]
        best = int(np.argmin(np.where(taken, np.inf, cost)))
        taken[best] = True
        text_uses[text[best]] += 1
        speaker_uses[speaker[best]] += 1
        chosen.append(best)
    while chosen:
        most, uses = Counter(int(text[place]) for place in chosen).most_common(1)[0]
        if 2 * uses <= len(chosen):
            break
        chosen.remove(next(place for place in reversed(chosen) if text[place] == most))
    return [int(order[place]) for place in chosen]


def derange(texts: list[str], lengths: list[int]) -> list[int]:
    """A permutation without texts that sound the same at i and result[i], close in length.

    Sorted by text, a shift by the largest number of equal texts never meets an equal one; exchanges
    that bring the lengths nearer follow until none is left.
    """
    spelling: dict[str, str] = {}  # the first one stands for all
    texts = [spelling.setdefault(plain_text(text), text) for text in texts]
    mean_length = {
        text: np.mean([n for n, other in zip(lengths, texts, strict=True) if other == text])
        for text in texts
    }
    order = sorted(
        range(len(texts)), key=lambda i: (mean_length[texts[i]], texts[i], lengths[i], i)
    )
    shift = max(Counter(texts).values())
    result = [0] * len(texts)
    for place, index in enumerate(order):
        result[index] = order[(place + shift) % len(order)]

    def distance(i: int, j: int) -> float:
        return float("inf") if texts[i] == texts[j] else abs(lengths[i] - lengths[j])

    improved = True
    while improved:
        improved = False
        for i in range(len(texts)):
            for j in range(i):
                now = distance(i, result[i]) + distance(j, result[j])
                if distance(i, result[j]) + distance(j, result[i]) < now:
                    result[i], result[j] = result[j], result[i]
                    improved = True
    return result
