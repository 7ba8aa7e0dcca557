"""Choose the reference that a clip is cloned from: another clip of its speaker."""

import numpy as np


class References:
    """The clips of each speaker, as references for one another.

    A reference has another text than its target, and the two together fit into `max_rows`.

    Args:
        texts, speakers: a number for each text and each speaker; speaker 0 is unknown.
        clips: ascending indices of the clips that may have and be references.
        num_rows: upper bound on the rows of each clip.
        max_rows: limit for a clip and its reference together.
    """

    def __init__(
        self,
        texts: np.ndarray,
        speakers: np.ndarray,
        clips: np.ndarray,
        num_rows: np.ndarray,
        max_rows: float,
    ):
        self._texts, self._speakers = texts, speakers
        self._num_rows, self._max_rows = num_rows, max_rows
        known = clips[speakers[clips] != 0]
        self._members = known[np.argsort(speakers[known], kind="stable")]  # speaker by speaker
        self._voices, self._starts = np.unique(speakers[self._members], return_index=True)
        self._ends = np.append(self._starts[1:], len(self._members))
        # For any text, one of these two is the speaker's shortest clip with another text.
        by_length = known[np.lexsort((num_rows[known], speakers[known]))]
        self._shortest = by_length[self._starts]
        voice = np.searchsorted(self._voices, speakers[by_length])
        is_other = texts[by_length] != texts[self._shortest[voice]]
        with_other, places = np.unique(voice[is_other], return_index=True)
        self._other = self._shortest.copy()  # stays so for a speaker with one text: never usable
        self._other[with_other] = by_length[is_other][places]

    def has_any(self, clips: np.ndarray) -> np.ndarray:
        """Whether each of these clips has any reference."""
        found = np.zeros(len(clips), dtype=bool)
        if len(self._voices):
            speakers = self._speakers[clips]
            voice = np.searchsorted(self._voices, speakers).clip(max=len(self._voices) - 1)
            found = self._usable(clips, self._shortest[voice])
            found |= self._usable(clips, self._other[voice])
            found &= self._voices[voice] == speakers
        return found

    def draw(self, index: int, pick: float) -> int:
        """Draw a reference for a clip that has one; `pick` in [0, 1) is the random number."""
        voice = np.searchsorted(self._voices, self._speakers[index])
        members = self._members[self._starts[voice] : self._ends[voice]]
        start = int(pick * len(members))
        places = (place % len(members) for place in range(start, start + len(members)))
        return next(int(members[p]) for p in places if self._usable(index, members[p]))

    def _usable(self, clips: np.ndarray | int, members: np.ndarray | int) -> np.ndarray:
        fits = self._num_rows[clips] + self._num_rows[members] <= self._max_rows
        return fits & (self._texts[members] != self._texts[clips])
