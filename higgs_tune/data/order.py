"""The order of training: a pure function of a seed.

So each process draws the same batches, and a run that resumes at a step sees what it would have seen.
"""

import math
from functools import lru_cache

import numpy as np

from higgs_tune.config import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset, within
from higgs_tune.data.references import References
from higgs_tune.errors import DataError

_WINDOW_BATCHES = 16  # batches whose clips are sorted by length together
_ORDER, _TASK, _REFERENCE = range(3)  # independent random streams of one epoch


class TrainOrder:
    """Which conversations each training step sees.

    Epochs follow one another without a gap, each a permutation of the rows, cut into batches of
    exactly `batch_clips`; clips of similar length share a batch. The task of a row is drawn anew
    in each epoch by the weights of `mix` among the tasks that the row can do: a clip can be cloned
    if it has a reference of its own or its speaker has another text. A chat row is its own task.

    Args:
        max_frames: longest clip; rows above are skipped and counted in `num_skipped`.
        max_text: longest text of one part, measured by `text_length` (characters by default).
        max_rows: positions that a base can hold; rows that may need more are skipped and counted,
            and no clip is cloned from a reference with which it would.

    Raises:
        DataError: no row is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        mix: TaskMix,
        batch_clips: int,
        seed: int,
        *,
        max_frames: int | None = None,
        max_text: int | None = None,
        max_rows: int | None = None,
        text_length: tasks.TextLength = len,
    ):
        self._dataset, self._batch_clips, self._seed = dataset, batch_clips, seed
        fitting = dataset.usable("train", max_frames, max_text, text_length)
        limit = math.inf if max_rows is None else max_rows
        num_rows = np.zeros(len(dataset.ids), dtype=np.int64)  # at most; 0 without a limit
        if max_rows is not None:
            for index in fitting:
                num_rows[index] = dataset.most_rows(index, text_length)
            fitting = [index for index in fitting if num_rows[index] <= limit]
        clips = [index for index in fitting if dataset.kinds[index] == "clip"]
        own_reference = {
            index
            for index in clips
            if (text := dataset.ref_texts[index]) is not None
            and within(dataset.num_frames[index][1], max_frames)
            and (max_text is None or text_length(text) <= max_text)
            and (
                max_rows is None
                or num_rows[index] + dataset.most_reference_rows(index, text_length) <= max_rows
            )
        }
        self._references = References(dataset.texts, dataset.speakers, clips, num_rows, limit)
        weights = np.zeros((len(dataset.ids), len(tasks.CLIP_TASKS)))
        for index in clips:
            weights[index] = [getattr(mix, task) for task in tasks.CLIP_TASKS]
            needs_reference = dataset.ref_texts[index] is None
            weights[index, 2] *= (
                self._references.exist(index) if needs_reference else index in own_reference
            )
        self._rows = np.array(
            [i for i in fitting if dataset.kinds[i] == "chat" or weights[i].sum() > 0],
            dtype=np.int64,
        )
        self.num_skipped = len(dataset.rows("train")) - len(self._rows)
        if not len(self._rows):
            raise DataError(
                f"{dataset.directory}: all {self.num_skipped} rows of the train split are skipped "
                f"(data.max_frames {max_frames}, longest text {max_text}, the base's "
                f"positions {max_rows}, tasks {mix}). Raise the "
                "limits or give a weight to a task that the rows can do."
            )
        self._cumulative = np.cumsum(weights[self._rows], axis=1)
        self._lengths = np.array(
            [sum(dataset.own_frames(i)) + len(dataset.texts[i]) for i in self._rows]
        )
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    def batch(self, step: int) -> list[Conversation]:
        """The conversations of step `step` (from 0); depends on the constructor's arguments only."""
        first = step * self._batch_clips
        places = (divmod(place, self.num_rows) for place in range(first, first + self._batch_clips))
        return [self._conversation(*self._epoch(epoch)[position]) for epoch, position in places]

    def _conversation(self, index: int, task: str, reference: int) -> Conversation:
        row = self._dataset.row(index)
        if task == "clone":
            return tasks.clone(row, None if reference < 0 else self._dataset.row(reference))
        return {"chat": tasks.chat, "transcribe": tasks.transcribe, "speak": tasks.speak}[task](row)

    def _draw_epoch(self, epoch: int) -> list[tuple[int, str, int]]:
        """Row, task and reference row (-1: none) at each position of the epoch."""
        draws = np.random.default_rng([self._seed, epoch, _TASK]).random((self.num_rows, 1))
        chosen = (draws * self._cumulative[:, -1:] >= self._cumulative).sum(axis=1)
        picks = np.random.default_rng([self._seed, epoch, _REFERENCE]).random(self.num_rows)
        plan = []
        lengths = self._lengths.copy()
        for place, index in enumerate(self._rows.tolist()):
            if self._dataset.kinds[index] == "chat":
                plan.append((index, "chat", -1))
                continue
            task = tasks.CLIP_TASKS[chosen[place]]
            reference = self._reference(index, picks[place]) if task == "clone" else -1
            if task == "clone":
                lengths[place] += self._dataset.num_frames[index if reference < 0 else reference][
                    -1
                ]
            plan.append((index, task, reference))
        return [plan[place] for place in self._permutation(epoch, lengths)]

    def _reference(self, index: int, pick: float) -> int:
        """Another text of the same speaker; -1 if the row has a reference of its own."""
        if self._dataset.ref_texts[index] is not None:
            return -1
        return self._references.draw(index, pick)

    def _permutation(self, epoch: int, lengths: np.ndarray) -> list[int]:
        """All places in random order, so that each batch inside the epoch has similar lengths."""
        rng = np.random.default_rng([self._seed, epoch, _ORDER])
        places = rng.permutation(self.num_rows)
        size = self._batch_clips
        # The batch that straddles the border to the epoch before takes the first places.
        head = min(-epoch * self.num_rows % size, self.num_rows)
        num_batches = (self.num_rows - head) // size
        body = places[head : head + num_batches * size]
        window = _WINDOW_BATCHES * size
        batches = []
        for start in range(0, len(body), window):
            part = body[start : start + window]
            batches += np.split(part[np.argsort(lengths[part], kind="stable")], len(part) // size)
        shuffled = [batches[number] for number in rng.permutation(num_batches)]
        tail = places[head + len(body) :]
        return np.concatenate([places[:head], *shuffled, tail]).tolist()
