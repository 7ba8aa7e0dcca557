"""What training and validation read: rows, the order of training, the fixed validation sets.

Everything random is a pure function of a seed, so each process draws the same batches and a run
that resumes at a step sees what it would have seen.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from higgs_tune.config import TaskMix
from higgs_tune.data import tasks
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.references import References
from higgs_tune.data.shards import DatasetInfo, Row, ShardFile, list_shards, read_info
from higgs_tune.data.swap import derange, spread
from higgs_tune.errors import DataError

EMBEDDED = Path(__file__).parents[1] / "embedded" / "speech"
_EMBEDDED_PREFIX = "embedded:"
_CACHED_GROUPS = 512  # row groups kept decoded: about 128 MiB of 10 s clips
_WINDOW_BATCHES = 16  # batches whose clips are sorted by length together
_ORDER, _TASK, _REFERENCE = range(3)  # independent random streams of one epoch


class Dataset:
    """A prepared dataset: small columns in memory, codes read from memory-mapped shards."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.info: DatasetInfo = read_info(directory)
        codebooks = self.info.codec.num_codebooks
        self._shards = [ShardFile(path, codebooks) for path in list_shards(directory)]
        self._starts = np.cumsum([0, *(shard.num_rows for shard in self._shards)])
        if self._starts[-1] != self.info.num_rows:
            raise DataError(
                f"{directory}: dataset.json says {self.info.num_rows} rows, the shards hold "
                f"{self._starts[-1]}. Delete the folder and run `higgs-tune data prepare` again."
            )
        names = ("id", "split", "kind", "speaker", "text", "ref_text", "turns", "num_frames")
        columns: dict[str, list] = {name: [] for name in names}
        for shard in self._shards:
            for name, column in shard.columns(names).to_pydict().items():
                columns[name] += column
        self.ids: list[str] = columns["id"]
        self.splits: list[str] = columns["split"]
        self.kinds: list[str] = columns["kind"]
        self.speakers: list[str] = columns["speaker"]
        self.texts: list[str] = columns["text"]
        self.ref_texts: list[str | None] = columns["ref_text"]
        self.turns: list[str | None] = columns["turns"]
        self.num_frames: list[list[int]] = columns["num_frames"]
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(self._read_group)

    @staticmethod
    def open(path: str) -> "Dataset":
        """Open a folder made by `higgs-tune data prepare`, or "embedded:NAME".

        Raises:
            DataError: nothing there, an unfinished or damaged dataset, or another format version.
        """
        if not path.startswith(_EMBEDDED_PREFIX):
            return Dataset(Path(path))
        name = path.removeprefix(_EMBEDDED_PREFIX)
        known = sorted(folder.parent.name for folder in EMBEDDED.glob("*/dataset.json"))
        if name not in known:
            raise DataError(f"data.path {path!r}: no such embedded dataset; there are {known}.")
        return Dataset(EMBEDDED / name)

    def rows(self, split: str) -> list[int]:
        """Indices of the rows of "train" or "validation"."""
        return [index for index, name in enumerate(self.splits) if name == split]

    def row(self, index: int) -> Row:
        """One row with its codes."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        inside = index - self._starts[shard]
        starts = self._shards[shard].group_starts
        group = int(np.searchsorted(starts, inside, side="right")) - 1
        return self._group(shard, group)[inside - starts[group]]

    def _read_group(self, shard: int, group: int) -> list[Row]:
        return self._shards[shard].group(group)

    def usable(
        self,
        split: str,
        max_frames: int | None = None,
        max_text: int | None = None,
        text_length: tasks.TextLength = len,
    ) -> list[int]:
        """Rows of a split whose audio and texts are within the limits."""
        return [
            index
            for index in self.rows(split)
            if _within(max(self.own_frames(index), default=0), max_frames)
            and (
                max_text is None
                or max(map(text_length, self._texts_of(index)), default=0) <= max_text
            )
        ]

    def own_frames(self, index: int) -> list[int]:
        """Frames of each audio of a row, the reference of a clip left out."""
        frames = self.num_frames[index]
        return frames[:1] if self.kinds[index] == "clip" else frames

    def most_rows(self, index: int, text_length: tasks.TextLength) -> int:
        """Rows that a row takes at most as a conversation, the reference of a clip left out."""
        turns = self.turns[index]
        num_turns = 2 if turns is None else len(json.loads(turns))
        return tasks.most_rows(
            self.own_frames(index),
            self._texts_of(index),
            num_turns,
            self.info.codec.num_codebooks,
            text_length,
        )

    def most_reference_rows(self, index: int, text_length: tasks.TextLength) -> int:
        """Rows that the own reference of a clip adds at most."""
        text, num_codebooks = self.ref_texts[index], self.info.codec.num_codebooks
        assert text is not None, self.ids[index]
        return tasks.most_rows(self.num_frames[index][1:2], [text], 2, num_codebooks, text_length)

    def _texts_of(self, index: int) -> list[str]:
        return tasks.texts_of(self.texts[index], self.turns[index])


def _within(value: int, limit: int | None) -> bool:
    return limit is None or value <= limit


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
            and _within(dataset.num_frames[index][1], max_frames)
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


@dataclass(frozen=True)
class ValidationSets:
    """Fixed validation conversations. `transcribe_swapped[i]` has the text of `transcribe[i]`
    after the audio of a clip with another text."""

    transcribe: tuple[Conversation, ...]
    transcribe_swapped: tuple[Conversation, ...]
    speak: tuple[Conversation, ...]


def validation_sets(
    dataset: Dataset,
    num_val_clips: int,
    seed: int = 0,
    *,
    max_frames: int | None = None,
    max_text: int | None = None,
    max_rows: int | None = None,
    text_length: tasks.TextLength = len,
) -> ValidationSets:
    """Draw the validation clips, spread evenly over texts and speakers, the same for every trial.

    Raises:
        DataError: the validation split has no two usable clips with different texts.
    """
    usable = dataset.usable("validation", max_frames, max_text, text_length)
    clips = [index for index in usable if dataset.kinds[index] == "clip"]
    if max_rows is not None:
        clips = _fitting_in_pairs(dataset, clips, max_rows, text_length)
    places = spread(
        [dataset.texts[index] for index in clips],
        [dataset.speakers[index] for index in clips],
        num_val_clips,
        seed,
    )
    chosen = sorted(clips[place] for place in places)
    if len(chosen) < 2:
        raise DataError(
            f"{dataset.directory}: the validation split has {len(clips)} usable clips with "
            f"{len({dataset.texts[index] for index in clips})} different texts, needed at least 2 "
            "of each (chat rows do not validate). Prepare the dataset with a larger --val-fraction "
            "or --clips-from-chat, or raise data.max_frames."
        )
    others = derange(
        [dataset.texts[index] for index in chosen],
        [dataset.num_frames[index][0] for index in chosen],
    )
    rows = [dataset.row(index) for index in chosen]
    return ValidationSets(
        transcribe=tuple(tasks.transcribe(row) for row in rows),
        transcribe_swapped=tuple(
            tasks.transcribe(row, audio_of=rows[other])
            for row, other in zip(rows, others, strict=True)
        ),
        speak=tuple(tasks.speak(row) for row in rows),
    )


def _fitting_in_pairs(
    dataset: Dataset, clips: list[int], max_rows: int, text_length: tasks.TextLength
) -> list[int]:
    """The clips without the longest ones, so that each one's audio fits with each other's text."""
    num_rows = np.array([dataset.most_rows(index, text_length) for index in clips], dtype=np.int64)
    texts = np.array([text_length(dataset.texts[index]) for index in clips], dtype=np.int64)
    order = np.argsort(num_rows, kind="stable")
    longest = np.maximum.accumulate((num_rows - texts)[order])
    longest += np.maximum.accumulate(texts[order])
    return sorted(clips[place] for place in order[longest <= max_rows])
