"""A prepared dataset as training and validation read it: rows, loaded when they are asked for."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from higgs_tune.data import tasks
from higgs_tune.data.shards import DatasetInfo, Row, ShardFile, list_shards, read_info
from higgs_tune.errors import DataError

EMBEDDED = Path(__file__).parents[1] / "embedded" / "speech"
_EMBEDDED_PREFIX = "embedded:"
_CACHED_GROUPS = 512  # row groups kept decoded: about 128 MiB of 10 s clips


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
            if within(max(self.own_frames(index), default=0), max_frames)
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


def within(value: int, limit: int | None) -> bool:
    """Whether a value keeps to a limit, where there is one."""
    return limit is None or value <= limit
