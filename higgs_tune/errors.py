"""Errors that a user can fix; everything else is an assertion.

Each message says where, what was found, what was needed and the next step. They survive pickling, because
they cross process boundaries under Ray.
"""

import difflib
import shutil
import traceback
from collections.abc import Iterable


class HiggsTuneError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(HiggsTuneError):
    """A setting is wrong: unknown key, value out of bounds, or two settings that exclude each other."""


class DataError(HiggsTuneError):
    """A manifest, clip, shard or dataset folder cannot be used as it is."""


class ModelError(HiggsTuneError):
    """A checkpoint or adapter cannot be used as it is."""


class LeakError(HiggsTuneError):
    """A preflight probe found labels that leak into the inputs, or are misaligned with them."""


class SweepError(HiggsTuneError):
    """A sweep cannot start, go on or be resumed."""


class NoMemoryError(HiggsTuneError):
    """There is no memory for the base or the codec; another program may hold it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A phrase that suggests the known name closest to a mistaken one, or an empty string."""
    match = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {match[0]!r}?" if match else ""


def reason_of(error: OSError) -> str:
    """Why a file operation failed, in a few words; for a folder's copy, the first failure."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
        return error.args[0][0][2]  # (source, target, reason) of each
    return str(error)


_NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",  # as transformers quotes it
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # where not even a context fits
    "CUDA driver error: out of memory",
    "ran out of memory outside PyTorch's allocator",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def release_frames(error: BaseException) -> None:
    """Release what the frames of an exception and its causes hold, such as a half-loaded model."""
    seen: set[int] = set()  # `raise error from error` makes a ring
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
