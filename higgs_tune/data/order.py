"""The order of training, as a pure function of a seed.

Each process therefore draws the same batches, and a resumed run sees what it would have seen.
"""

import math
from functools import lru_cache

import numpy as np

from higgs_tune.config_data import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.references import References
from higgs_tune.errors import DataError

WINDOW_BATCHES = 16  # batches whose clips are sorted by length together
_CLONE, _CHAT = tasks.CLIP_TASKS.index("clone"), len(tasks.CLIP_TASKS)  # task numbers
_ORDER, _TASK, _REFERENCE = range(3)  # independent random streams of one epoch


class TrainOrder:
    """The conversations that each training step sees.

    Each epoch is a permutation of the rows. Epochs are concatenated and cut into batches of exactly
    `batch_clips`; clips of similar length share a batch. In each epoch a row's task is drawn anew, with
    the weights of `mix`, from the tasks that the row can do: a clip can be cloned if it has a reference
    of its own or its speaker has another text. A chat row is always the task `chat`.

    Args:
        max_frames: longest clip; longer rows are skipped and counted in `num_skipped`.
        max_text: longest text of one part, measured by `text_length` (characters by default).
        max_rows: longest conversation, without the turn of `system_text`; rows that may need more are
            skipped and counted, and no clip is cloned from a reference with which it may need more.
        system_text: text of a system turn before each spoken clip.

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
        system_text: str | None = None,
    ):
        self._dataset, self._batch_clips, self._seed = dataset, batch_clips, seed
        self._system_text = system_text
        index = dataset.index
        fitting = dataset.usable("train", max_frames, max_text, text_length)
        num_rows = np.zeros(len(index), dtype=np.int64)  # upper bounds; 0 without a limit
        if max_rows is not None:
            num_rows = dataset.sizes(text_length)["rows"].astype(np.int64)
            fitting = fitting[num_rows[fitting] <= max_rows]
        is_clip = index["is_clip"][fitting]
        clips = fitting[is_clip]
        own_fits = np.ones(len(clips), dtype=bool)
        if max_frames is not None:
            own_fits &= index["last_audio"][clips] <= max_frames
        if max_text is not None:
            own_fits &= dataset.sizes(text_length)["reference_text"][clips] <= max_text
        if max_rows is not None:
            reference_rows = dataset.sizes(text_length)["reference_rows"]
            own_fits &= num_rows[clips] + reference_rows[clips] <= max_rows
        self._references = References(
            index["text"],
            index["speaker"],
            clips,
            num_rows,
            math.inf if max_rows is None else max_rows,
        )
        weights = np.zeros((len(fitting), len(tasks.CLIP_TASKS)))
        weights[is_clip] = [getattr(mix, task) for task in tasks.CLIP_TASKS]
        weights[is_clip, 2] *= np.where(
            index["has_reference"][clips], own_fits, self._references.has_any(clips)
        )
        kept = ~is_clip | (weights.sum(axis=1) > 0)
        self._rows = fitting[kept]
        self.num_skipped = len(dataset.rows("train")) - len(self._rows)
        if not len(self._rows):
            raise DataError(
                f"{dataset.directory}: all {self.num_skipped} rows of the train split are skipped "
                f"(data.max_frames {max_frames}, longest text {max_text}, "
                f"longest conversation {max_rows} rows, tasks {mix}). Raise the "
                "limits or give a weight to a task that the rows can do."
            )
        self._cumulative = np.cumsum(weights[kept], axis=1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    def epochs(self, num_steps: int) -> float:
        """Passes over the rows in `num_steps` steps."""
        return num_steps * self._batch_clips / self.num_rows

    def batch(self, step: int) -> list[Conversation]:
        """The conversations of step `step` (from 0); depends only on the constructor's arguments."""
        first = step * self._batch_clips
        places = (divmod(place, self.num_rows) for place in range(first, first + self._batch_clips))
        talks = (self._conversation(*self._epoch(epoch)[position]) for epoch, position in places)
        return [tasks.with_system_turn(talk, self._system_text) for talk in talks]

    def _conversation(self, index: int, task: int, reference: int) -> Conversation:
        row = self._dataset.row(index)
        if task == _CLONE:
            return tasks.clone(row, None if reference < 0 else self._dataset.row(reference))
        return {0: tasks.transcribe, 1: tasks.speak, _CHAT: tasks.chat}[int(task)](row)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """For each position of the epoch: row, task number, reference row (-1: none)."""
        index = self._dataset.index
        draws = np.random.default_rng([self._seed, epoch, _TASK]).random((self.num_rows, 1))
        task = (draws * self._cumulative[:, -1:] >= self._cumulative).sum(axis=1)
        task[~index["is_clip"][self._rows]] = _CHAT
        picks = np.random.default_rng([self._seed, epoch, _REFERENCE]).random(self.num_rows)
        lengths = (index["num_frames"] + index["num_chars"])[self._rows]
        references = np.full(self.num_rows, -1)
        for place in np.flatnonzero(task == _CLONE):
            row = self._rows[place]
            if not index["has_reference"][row]:
                references[place] = self._references.draw(row, picks[place])
            heard = row if references[place] < 0 else references[place]
            lengths[place] += index["last_audio"][heard]
        plan = np.stack([self._rows, task, references], axis=1)
        return plan[self._permutation(epoch, lengths)]

    def _permutation(self, epoch: int, lengths: np.ndarray) -> np.ndarray:
        """All places in random order, with similar lengths in each batch that lies inside the epoch."""
        rng = np.random.default_rng([self._seed, epoch, _ORDER])
        places = rng.permutation(self.num_rows)
        size = self._batch_clips
        # The batch that straddles the boundary with the previous epoch takes the first places.
        head = min(-epoch * self.num_rows % size, self.num_rows)
        num_batches = (self.num_rows - head) // size
        body = places[head : head + num_batches * size]
        window = WINDOW_BATCHES * size
        batches = []
        for start in range(0, len(body), window):
            part = body[start : start + window]
            batches += np.split(part[np.argsort(lengths[part], kind="stable")], len(part) // size)
        shuffled = [batches[number] for number in rng.permutation(num_batches)]
        tail = places[head + len(body) :]
        return np.concatenate([places[:head], *shuffled, tail])
