"""Choose the clips that validation uses, and the clip that each one swaps its audio with."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from higgs_tune.data.plain_text import sound_of


def choose_spread_out(texts: np.ndarray, speakers: np.ndarray, count: int, seed: int) -> list[int]:
    """Return the places of up to `count` clips: least used text first, then speaker, then at random.

    No text fills more than half, so that each clip can be swapped with one of another text. `texts` and
    `speakers` are any numbers that are equal for equal texts and speakers.
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
    kept = limit_groups_to_half([int(text[place]) for place in chosen])
    return [int(order[chosen[place]]) for place in kept]


def group_labels(texts: list[str], recordings: list[bytes]) -> list[str]:
    """Group clips that share a text or a recording; return for each clip one text that names its group.

    Clips may also share them through others: any recording of the group may say the clip's own text. Texts
    that sound the same count as one.
    """
    label = list(range(len(texts)))  # of a clip: the first one of its group
    for names in ([sound_of(text) for text in texts], recordings):
        first: dict[str | bytes, int] = {}
        for place, name in enumerate(names):
            ours, theirs = label[place], label[first.setdefault(name, place)]
            label = [min(ours, theirs) if one in (ours, theirs) else one for one in label]
    return [texts[one] for one in label]


def limit_groups_to_half(groups: Sequence[Hashable]) -> list[int]:
    """Return the places of the clips to keep, so that no group has over half; its last clips are dropped."""
    kept = list(range(len(groups)))
    while kept:
        most, uses = Counter(groups[place] for place in kept).most_common(1)[0]
        if 2 * uses <= len(kept):
            break
        kept.remove(next(place for place in reversed(kept) if groups[place] == most))
    return kept


def swaps(groups: list[str], lengths: list[int], languages: Sequence[str | None]) -> list[int]:
    """Return a derangement within each language, so that the language does not give a swap away.

    Clips whose language has too few groups are swapped with the next larger language, or with all.
    """
    result = [0] * len(groups)
    parts: dict[str | None, list[int]] = {}
    for place, language in enumerate(languages):
        parts.setdefault(language, []).append(place)
    waiting: list[int] = []
    for part in sorted(parts.values(), key=len):
        waiting = sorted([*waiting, *part])
        own = [groups[place] for place in waiting]
        if len(limit_groups_to_half(own)) == len(own):
            others = derange(own, [lengths[place] for place in waiting])
            for place, other in zip(waiting, others, strict=True):
                result[place] = waiting[other]
            waiting = []
    return derange(groups, lengths) if waiting else result


def derange(groups: list[str], lengths: list[int]) -> list[int]:
    """Return a permutation in which i and result[i] are of different groups and of similar length.

    In an order sorted by group, a shift by the largest group's size never meets the same group. Then pairs
    are exchanged until no exchange brings lengths closer. No group may have more than half of the clips.
    """
    mean_length = {
        group: np.mean([n for n, other in zip(lengths, groups, strict=True) if other == group])
        for group in groups
    }
    order = sorted(
        range(len(groups)), key=lambda i: (mean_length[groups[i]], groups[i], lengths[i], i)
    )
    shift = max(Counter(groups).values())
    result = [0] * len(groups)
    for place, index in enumerate(order):
        result[index] = order[(place + shift) % len(order)]

    def distance(i: int, j: int) -> float:
        return float("inf") if groups[i] == groups[j] else abs(lengths[i] - lengths[j])

    improved = True
    while improved:
        improved = False
        for i in range(len(groups)):
            for j in range(i):
                now = distance(i, result[i]) + distance(j, result[j])
                if distance(i, result[j]) + distance(j, result[i]) < now:
                    result[i], result[j] = result[j], result[i]
                    improved = True
    return result
