"""Encode recordings into codes in one process, be it the main process or a Ray actor.

Shape letters: T frames, C codebooks.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from higgs_tune.data.audio import locate, read_clip
from higgs_tune.data.codec import Codec, encode_clip
from higgs_tune.errors import DataError, NoMemoryError, is_out_of_memory

_CACHED_CLIPS = 64  # a reference recording often serves many rows

Names = tuple[str, ...]  # the recordings of one row, as the manifest gives them
Codes = tuple[np.ndarray, ...]  # (T, C) for each of them
Outcome = Codes | str  # the codes of a row, or why its audio cannot be used


@dataclass(frozen=True)
class ClipRules:
    """Where recordings must be and how long they may be."""

    root: Path  # resolved
    min_seconds: float
    max_seconds: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread, so that codes do not depend on the number of workers or cores.

    A sum that is split over several threads can round differently and give another code.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clip_encoder(codec: Codec, rules: ClipRules) -> Callable[[Names], Outcome]:
    """Return a function that encodes a row's recordings; it caches the most recent clips.

    The function raises NoMemoryError if the device has no memory for a clip.
    """

    @lru_cache(maxsize=_CACHED_CLIPS)
    def codes(name: str) -> np.ndarray:
        wave, rate_hz = read_clip(
            locate(rules.root, name),
            min_seconds=rules.min_seconds,
            max_seconds=rules.max_seconds,
            target_rate_hz=codec.config.sample_rate,
        )
        try:
            return encode_clip(codec, wave, rate_hz)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise NoMemoryError(
                f"{name}: not enough memory on {codec.device} to encode {len(wave) / rate_hz:.1f} s: "
                f"{error}. Lower --workers or --max-seconds, or choose another --device."
            ) from error

    def outcome(names: Names) -> Outcome:
        found: list[np.ndarray] = []
        try:
            for name in names:
                found.append(codes(name))
        except DataError as problem:
            return reason_of(names, len(found), problem)
        return tuple(found)

    return outcome


def reason_of(names: Names, place: int, problem: Exception) -> str:
    """Why a row is rejected. Any recording but the first is named: a `Rejection` has the first's path."""
    return f"{names[place]!r}: {problem}" if place else str(problem)


def encode_here(
    codec: Codec, rules: ClipRules, rows: Iterable[Names]
) -> Generator[Outcome, None, None]:
    """Encode row by row in this process."""
    coder = clip_encoder(codec, rules)
    for names in rows:
        with one_thread():
            found = coder(names)
        yield found
