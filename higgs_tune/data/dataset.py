"""Read a prepared dataset for training and validation; rows are loaded on demand."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from higgs_tune.data import tasks
from higgs_tune.data.plain_text import sound_of
from higgs_tune.data.shards import DatasetInfo, Row, ShardFile, list_shards, read_info
from higgs_tune.errors import DataError

EMBEDDED = Path(__file__).parents[1] / "embedded" / "speech"
_EMBEDDED_PREFIX = "embedded:"
_CACHED_GROUPS = 512  # row groups kept decoded: about 128 MiB of 10 s clips
_OPEN_SHARDS = 64  # each takes a file handle and 75 kB of metadata
# Kept in memory for each row: 35 bytes. Audio is measured in frames, without a clip's reference, except that
# `last_audio` is that reference if there is one. Speakers and texts are hashes, equal for texts that sound
# the same.
_INDEX = np.dtype(
    [
        ("is_train", bool),
        ("is_clip", bool),
        ("has_reference", bool),
        ("speaker", np.uint64),  # 0 is unknown
        ("text", np.uint64),
        ("num_chars", np.int32),  # of the text
        ("longest_audio", np.int32),
        ("num_frames", np.int32),
        ("last_audio", np.int32),
    ]
)
# Kept as well once texts are measured: 20 bytes per row. A clip's reference is counted separately.
_SIZES = np.dtype(
    [
        ("text", np.int32),  # 0 for a chat
        ("longest_text", np.int32),
        ("rows", np.int32),  # upper bound, as a conversation
        ("reference_text", np.int32),  # 0 without a reference
        ("reference_rows", np.int32),
    ]
)


def dataset_folder(path: str) -> Path:
    """Return the folder of the dataset that `data.path` names, as a folder or as "embedded:NAME".

    Raises:
        DataError: there is no such embedded dataset.
    """
    if not path.startswith(_EMBEDDED_PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(_EMBEDDED_PREFIX)
    known = sorted(folder.parent.name for folder in EMBEDDED.glob("*/dataset.json"))
    if name not in known:
        raise DataError(f"data.path {path!r}: no such embedded dataset; there are {known}.")
    return EMBEDDED / name


class Dataset:
    """A prepared dataset: a few numbers per row in memory, the rest in memory-mapped shards.

    `index` is a structured array with one element per row; its fields are those of `_INDEX`.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.info: DatasetInfo = read_info(directory)
        self._paths = list_shards(directory)
        num_codebooks = self.info.codec.num_codebooks
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(
            lambda place: ShardFile(self._paths[place], num_codebooks)
        )
        names = ("split", "kind", "speaker", "text", "ref_text", "num_frames")
        parts = list(self._numbers(_INDEX, names, _index_entry))
        self._starts = np.cumsum([0, *map(len, parts)])
        if self._starts[-1] != self.info.num_rows:
            raise DataError(
                f"{directory}: dataset.json says {self.info.num_rows} rows, the shards hold "
                f"{self._starts[-1]}. Delete the folder and run `higgs-tune data prepare` again."
            )
        self.index = np.concatenate([np.zeros(0, _INDEX), *parts])
        self.sizes = lru_cache(maxsize=2)(self._sizes)
        self._group = lru_cache(maxsize=_CACHED_GROUPS)(
            lambda shard, group: self._shard(shard).group(group)
        )

    @staticmethod
    def open(path: str) -> "Dataset":
        """Open a folder made by `higgs-tune data prepare`, or "embedded:NAME".

        Raises:
            DataError: no dataset, an unfinished or damaged one, or one of another format version.
        """
        return Dataset(dataset_folder(path))

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the id and all text parts of each row, reading the shards on each call."""
        names = ("id", "text", "ref_text", "turns")
        for place in range(len(self._paths)):
            for row_id, text, ref_text, turns in self._shard(place).values(names):
                yield row_id, tasks.texts_of(text, turns, ref_text)

    def rows(self, split: str) -> np.ndarray:
        """Indices of the rows of "train" or "validation"."""
        return np.flatnonzero(self.index["is_train"] == (split == "train"))

    def row(self, index: int) -> Row:
        """One row with its codes."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        inside = index - self._starts[shard]
        starts = self._shard(shard).group_starts
        group = int(np.searchsorted(starts, inside, side="right")) - 1
        return self._group(shard, group)[inside - starts[group]]

    def usable(
        self,
        split: str,
        max_frames: int | None = None,
        max_text: int | None = None,
        text_length: tasks.TextLength = len,
    ) -> np.ndarray:
        """Indices of the rows of a split whose audio and texts are within the limits."""
        rows = self.rows(split)
        if max_frames is not None:
            rows = rows[self.index["longest_audio"][rows] <= max_frames]
        if max_text is not None:
            rows = rows[self.sizes(text_length)["longest_text"][rows] <= max_text]
        return rows

    def _sizes(self, text_length: tasks.TextLength) -> np.ndarray:
        """Measure each row's texts into a structured array with the fields of `_SIZES`."""
        num_codebooks = self.info.codec.num_codebooks

        def measure(
            kind: str, text: str, ref_text: str | None, turns: str | None, frames: list[int]
        ) -> tuple[int, ...]:
            lengths = [text_length(part) for part in tasks.texts_of(text, turns)]
            num_turns = 2 if turns is None else len(json.loads(turns))
            own = _own_frames(kind, frames)
            rows = tasks.most_rows(own, lengths, num_turns, num_codebooks)
            is_clip = kind == "clip"
            if not (is_clip and ref_text is not None):
                return lengths[0] if is_clip else 0, max(lengths, default=0), rows, 0, 0
            reference = text_length(ref_text)
            reference_rows = tasks.most_rows(frames[1:2], [reference], 2, num_codebooks)
            return lengths[0], lengths[0], rows, reference, reference_rows

        names = ("kind", "text", "ref_text", "turns", "num_frames")
        return np.concatenate([np.zeros(0, _SIZES), *self._numbers(_SIZES, names, measure)])

    def _numbers(
        self, kind: np.dtype, names: Sequence[str], numbers: Callable[..., tuple[int, ...]]
    ) -> Iterator[np.ndarray]:
        """For each shard, yield an array of what `numbers` makes of the columns `names` of its rows."""
        for place in range(len(self._paths)):
            rows = self._shard(place).values(names)
            yield np.array([numbers(*values) for values in rows], dtype=kind)


def _own_frames(kind: str, frames: list[int]) -> list[int]:
    """Frames of each audio of a row, without a clip's reference."""
    return frames[:1] if kind == "clip" else frames


def _index_entry(
    split: str, kind: str, speaker: str, text: str, ref_text: str | None, frames: list[int]
) -> tuple[int, ...]:
    """A row's element of the index, with the fields of `_INDEX`."""
    own = _own_frames(kind, frames)
    return (
        split == "train",
        kind == "clip",
        kind == "clip" and ref_text is not None,
        _name_number(speaker),
        _name_number(sound_of(text)),
        len(text),
        max(own, default=0),
        sum(own),
        frames[-1] if frames else 0,
    )


def _name_number(name: str) -> int:
    """Hash a name to 64 bits, "" to 0; among 10 million names a collision has probability 3e-6."""
    if not name:
        return 0
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
