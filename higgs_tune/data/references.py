"""Whose voice a clip is cloned from: another clip of its speaker."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


class References:
    """The clips of each speaker, as references for one another.

    A reference has another text than its target, and the two together fit the rows there are.

    Args:
        clips: indices of the clips that may refer and be referred to.
        num_rows: index → rows that the clip takes at most.
        max_rows: limit of a clip and its reference together.
    """

    def __init__(
        self,
        texts: Sequence[str],
        speakers: Sequence[str],
        clips: Sequence[int],
        num_rows: np.ndarray,
        max_rows: float,
    ):
        self._texts, self._speakers = texts, speakers
        self._num_rows, self._max_rows = num_rows, max_rows
        self._by_speaker: dict[str, list[int]] = defaultdict(list)
        for index in clips:
            if speakers[index]:
                self._by_speaker[speakers[index]].append(index)
        # One of these two is the shortest clip with another text, whichever text that is.
        self._shortest: dict[str, list[int]] = {}
        for speaker, members in self._by_speaker.items():
            first = min(members, key=num_rows.__getitem__)
            others = [member for member in members if texts[member] != texts[first]]
            self._shortest[speaker] = [first, *sorted(others, key=num_rows.__getitem__)[:1]]

    def exist(self, index: int) -> bool:
        """Whether the clip has any reference."""
        shortest = self._shortest.get(self._speakers[index], [])
        return any(self._usable(index, member) for member in shortest)

    def draw(self, index: int, pick: float) -> int:
        """A reference of the clip; `pick` in [0, 1) is the chance."""
        members = self._by_speaker[self._speakers[index]]
        start = int(pick * len(members))
        candidates = members[start:] + members[:start]
        return next(member for member in candidates if self._usable(index, member))

    def _usable(self, index: int, member: int) -> bool:
        fits = self._num_rows[index] + self._num_rows[member] <= self._max_rows
        return bool(fits) and self._texts[member] != self._texts[index]
